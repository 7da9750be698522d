"""The example in C++: built against a wheel, trained, stopped, and given what is wrong."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cpp_programs import build, needed_libraries
from training import ngrams
from wheels import PATH, ROOT, make_wheel, unpack

pytestmark = [pytest.mark.needs_build, pytest.mark.slow]

SOURCE = ROOT / "examples" / "cpp"
#: Steps take milliseconds.
TINY = (
    *("--layers", "2", "--hidden-size", "32", "--intermediate-size", "16", "--experts", "4"),
    *("--context", "32", "--batch-tokens", "256", "--threads", "1"),
)
SHORT = (*TINY, "--steps", "600", "--every", "40")
#: step, train, valid; then come tokens per second and the time that is left.
LINE = re.compile(r"^ *(\d+)  +([\d.]+)  +([\d.]+)  +[\d,]+  +[\d:]+$", re.MULTILINE)
ROW = re.compile(r"^expert +(\d+) +([\d. ]+)$", re.MULTILINE)
RESULT = re.compile(r"^validation: ([\d.]+) bits per byte after (\d+) steps$", re.MULTILINE)


class Part(NamedTuple):
    """What a run printed, and how it ended."""

    out: str
    error: str
    status: int

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The step and the two losses of each line, as they stand there."""
        return LINE.findall(self.out)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as its main file says, but against the wheel."""
    folder = tmp_path_factory.mktemp("example")
    wheel = make_wheel(tmp_path_factory.mktemp("wheel"))
    package = unpack(wheel, folder / "site-packages")
    arguments = "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS=-Werror"
    built = build(SOURCE, folder / "build", *arguments, package=str(package / "share" / "cmake"))
    assert f"torchmoe_DIR:PATH={package}" in (built / "CMakeCache.txt").read_text()
    return built / "train_lm"


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is where the tests run behind a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(program: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in (program, *arguments)],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], printed: str = "") -> Part:
    out, error = process.communicate()
    return Part(printed + out, error, process.returncode)


def train(program: Path, *arguments: str | Path) -> Part:
    part = finish(start(program, *arguments))
    assert (part.error, part.status) == ("", 0)
    return part


def until(process: subprocess.Popen[str], lines: int) -> str:
    """What the process prints up to that number of lines in the table of its steps; 0: its head."""
    assert process.stdout is not None
    printed = ""
    while "tokens/s" not in printed or len(LINE.findall(printed)) < lines:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed


def interrupted(process: subprocess.Popen[str], lines: int) -> Part:
    printed = until(process, lines)
    process.send_signal(signal.SIGINT)
    return finish(process, printed)


def weights(folder: Path) -> dict[str, Tensor]:
    """The model in a checkpoint, whose first line comes before what torch wrote."""
    archive = (folder / "checkpoint").read_bytes().partition(b"\n")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit.load
        return dict(torch.jit.load(io.BytesIO(archive)).model.state_dict())


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert len(first) > 20
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_refused(part: Part, message: str, status: int = 2) -> None:
    """One sentence, and nothing else."""
    assert re.fullmatch(f"train_lm: {message}\n", part.error), part.error
    assert (part.out, part.status) == ("", status)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = ["moon", "rose", "over", "quiet", "hills", "while", "seven", "grey", "wolves", "sang"]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choice(words) for _ in range(12_000)))
    return file


@pytest.fixture(scope="module")
def whole(program: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Part, Path]:
    """A short run that nobody stopped, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(program, *SHORT, "--out", folder, text), folder


# ---- what it learns


def split(files: list[Path]) -> tuple[bytes, bytes]:
    """What the program trains on and what it validates with: text.h says how."""
    data = b"".join(file.read_bytes() for file in files)
    blocks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    held_out = blocks[9::10]
    del blocks[9::10]
    return b"".join(blocks), b"".join(held_out)


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def validation_windows(data: bytes, context: int) -> Tensor:
    count = min(256, len(data) // (context + 1))
    stride = len(data) // count
    return torch.stack(
        [as_tensor(data[n * stride : n * stride + context + 1]) for n in range(count)]
    )


def test_predicts_better_than_a_3gram_fitted_to_the_same_bytes(
    program: Path, tmp_path: Path
) -> None:
    (patterns,) = re.findall(
        r"^//   build/example/train_lm (.+)$", (SOURCE / "train_lm.cpp").read_text(), re.MULTILINE
    )
    files = [file for pattern in patterns.split() for file in sorted(ROOT.glob(pattern))]
    training, validation = split(files)
    windows = validation_windows(validation, context=128)
    model = ngrams.fit([as_tensor(training)], order=3)
    trigram = float(model.bits(windows, order=3).mean())

    part = train(program, "--out", tmp_path, *files)
    sizes = f"{len(training):,} bytes to train on, {len(validation):,} for validation"
    assert f"text        {sizes}\n" in part.out
    ((bits, steps),) = RESULT.findall(part.out)
    assert int(steps) == int(part.lines[-1][0]) == 100 * len(part.lines)
    assert bits == part.lines[-1][2]
    assert float(bits) < 0.8 * trigram

    shares = torch.tensor(
        [[float(share) for share in row.split()] for _, row in ROW.findall(part.out)]
    )
    assert shares.shape == (8, 4)  # experts, layers
    assert shares.sum(0).tolist() == pytest.approx([100] * 4, abs=0.4)  # each is rounded
    assert shares.min() > 2
    for name, extreme in (("most", shares.amax(0)), ("least", shares.amin(0))):
        (row,) = re.findall(rf"^{name}/even +([\d. ]+)$", part.out, re.MULTILINE)
        expected = (extreme * 8 / 100).tolist()
        assert [float(value) for value in row.split()] == pytest.approx(expected, abs=0.01)
    assert max(map(len, part.out.splitlines())) < 80 + len(str(tmp_path))


def test_bits_are_bits_and_no_byte_is_seen_before_it_is_predicted(
    program: Path, tmp_path: Path
) -> None:
    """Of 16 letters drawn at random each costs 4 bits; whoever sees the letter pays less."""
    letters = random.Random(0).choices("abcdefghijklmnop", k=200_000)
    (tmp_path / "letters.txt").write_text("".join(letters))
    # In two bytes there is little to search for what must not be seen.
    short = (*SHORT, "--context", "2", "--out", tmp_path / "run")
    part = train(program, *short, tmp_path / "letters.txt")
    ((bits, _),) = RESULT.findall(part.out)
    assert 3.99 < float(bits) < 4.1


def test_needs_no_python(program: Path) -> None:
    needed = needed_libraries(program)
    assert "libtorchmoe.so" in needed
    assert not [name for name in needed if "python" in name]


def test_help_lists_every_option_and_its_default(program: Path) -> None:
    text = train(program, "--help").out
    listed = re.findall(r"^  (--[\w-]+) +.+ \((\S+)\)$", text, re.MULTILINE)
    header = (SOURCE / "settings.h").read_text()
    defaults = re.findall(r'^  (?:int64_t|std::string) (\w+) = "?([\w/]+)"?;', header, re.MULTILINE)
    assert listed == [(f"--{name.replace('_', '-')}", value) for name, value in defaults]
    assert max(map(len, text.splitlines())) <= 80


# ---- stopped and resumed


def test_a_stopped_run_ends_with_the_numbers_of_one_that_was_not(
    program: Path, text: Path, whole: tuple[Part, Path], tmp_path: Path
) -> None:
    command = (program, *SHORT, "--out", tmp_path, text)
    lines: list[tuple[str, str, str]] = []
    stops = [0]
    # Right after a line, and, which the first try may miss, in the middle between two.
    while len(stops) == 1 or stops[-1] % 40 == 0:
        part = interrupted(start(*command), 2 if len(stops) == 1 else 0)
        assert (part.error, part.status) == ("", 130)
        (stop,) = re.findall(
            r"\nstopped after step (\d+) of 600; the same command goes on from there\n\Z", part.out
        )
        assert len(ROW.findall(part.out)) == 4
        goes_on = f", step {stops[-1]} of 600" if len(stops) > 1 else ""
        assert f"checkpoint  {tmp_path}/checkpoint{goes_on}\n" in part.out
        lines += [line for line in part.lines if int(line[0]) % 40 == 0]
        stops.append(int(stop))
    part = train(*command)
    assert lines + part.lines == whole[0].lines
    assert (
        part.out[part.out.index("\nExperts'") :] == whole[0].out[whole[0].out.index("\nExperts'") :]
    )
    assert_same(tmp_path, whole[1])

    again = train(*command)  # there is nothing left to do
    assert again.lines == []
    assert RESULT.findall(again.out) == RESULT.findall(part.out)
    assert_same(tmp_path, whole[1])


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    program: Path, text: Path, whole: tuple[Part, Path], tmp_path: Path
) -> None:
    command = (program, *SHORT, "--out", tmp_path, text)
    killed = start(*command)
    until(killed, 3)
    killed.kill()
    assert finish(killed).status == -signal.SIGKILL
    before = (tmp_path / "checkpoint").read_bytes()

    # Python ignores the signal about a file that is too large, and so does this child.
    limited = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 64; exec "$@"', "sh", *map(str, command)],
        capture_output=True,
        text=True,
        restore_signals=False,
        check=False,
    )
    assert limited.stderr == f"train_lm: cannot write {tmp_path}/checkpoint.new: File too large\n"
    assert limited.returncode == 1
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]

    assert train(*command).lines[-1] == whole[0].lines[-1]
    assert_same(tmp_path, whole[1])


def catches_interrupt(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


def test_a_second_interrupt_kills_at_once(program: Path, text: Path, tmp_path: Path) -> None:
    huge = ("--batch-tokens", "200000")  # a step outlasts what happens in it
    process = start(program, *TINY, *huge, "--out", tmp_path, text)
    while not catches_interrupt(process):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while catches_interrupt(process):  # the first has not come yet
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    part = finish(process)
    assert (part.error, part.status) == ("", -signal.SIGINT)
    assert part.lines == []
    assert len(weights(tmp_path)) > 20  # the checkpoint is whole


def test_an_ignored_interrupt_stays_ignored(program: Path, text: Path, tmp_path: Path) -> None:
    """As in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    part = interrupted(start(program, *SHORT, "--out", tmp_path, text), 1)
    assert part.status == 0
    assert RESULT.search(part.out)


# ---- what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"FILE must be at least one file of text, got none \(--help explains\)"),
        ("nowhere", r"FILE must be .*, got nowhere \(No such file or directory\)"),
        ("docs", r"FILE must be .*, got docs \(a folder\)"),
        (
            "VERSION.txt",
            r"the text must have at least 36993 bytes with --context 128, got \d",
        ),
        (
            "--context 8191 --batch-tokens 8191 VERSION.txt",
            "the text must have at least 81920 bytes with --context 8191, got .*",
        ),
        ("--steps 0 FILE", "--steps must be a whole number from 1 to 100000000, got 0"),
        ("--steps -3 FILE", "--steps must be a whole number from 1 to 100000000, got -3"),
        ("--steps=12x FILE", "--steps must be a whole number from 1 to 100000000, got 12x"),
        ("--steps 1e3 FILE", "--steps must be .*, got 1e3"),
        ("--steps 99999999999999999999 FILE", "--steps must be .*, got 99999999999999999999"),
        ("--steps= FILE", "--steps must be .*, got nothing"),
        ("FILE --steps", "--steps must be followed by a value, got nothing"),
        ("--out= FILE", "--out must be a folder, got nothing"),
        ("--stepz 3 FILE", "argument must be a file or an option .*, got --stepz"),
        ("-steps 3 FILE", "argument must be a file or an option .*, got -steps"),
        ("--hidden-size 48 FILE", "--hidden-size must be a multiple of 32, got 48"),
        ("--experts 2 --top-k 3 FILE", "--top-k must be at most --experts, which is 2, got 3"),
        (
            "--context 64 --batch-tokens 63 FILE",
            "--batch-tokens must be at least --context, which is 64, got 63",
        ),
    ],
)
def test_refuses_wrong_arguments(
    program: Path, tmp_path: Path, text: Path, arguments: str, message: str
) -> None:
    words = [word.replace("FILE", str(text)) for word in arguments.split()]
    folder = tmp_path / "run"
    assert_refused(finish(start(program, "--out", folder, *words)), message)
    assert not folder.exists()


@pytest.fixture
def started(program: Path, text: Path, tmp_path: Path) -> Path:
    """The folder of a run of one step."""
    train(program, *TINY, "--steps", "1", "--out", tmp_path / "run", text)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("--steps", "2"), "--steps must stay 1, .*, got 2; .*"),
        (("--seed", "1"), "--seed must stay 0, .*, got 1; .*"),
        (("--intermediate-size", "17"), "--intermediate-size must stay 16, .*, got 17; .*"),
        (("--experts", "5"), "--experts must stay 4, .*, got 5; .*"),
    ],
)
def test_refuses_a_checkpoint_of_other_settings(
    program: Path, text: Path, started: Path, setting: tuple[str, str], message: str
) -> None:
    before = (started / "checkpoint").read_bytes()
    command = (program, *TINY, "--steps", "1", *setting, "--out", started, text)
    assert_refused(finish(start(*command)), message)
    assert (started / "checkpoint").read_bytes() == before


def test_goes_on_with_another_number_of_threads(program: Path, text: Path, started: Path) -> None:
    train(program, *TINY, "--steps", "1", "--threads", "2", "--out", started, text)


def test_refuses_a_checkpoint_of_another_text(program: Path, text: Path, started: Path) -> None:
    before = (started / "checkpoint").read_bytes()
    other = started.parent / "other.txt"
    other.write_text(text.read_text().replace("moon", "noon", 1))
    command = (program, *TINY, "--steps", "1", "--out", started, other)
    message = r"the text must be the one with which .*/run/checkpoint was made, got another; .*"
    assert_refused(finish(start(*command)), message)
    assert (started / "checkpoint").read_bytes() == before


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_refuses_a_damaged_checkpoint(
    program: Path, text: Path, started: Path, damage: str
) -> None:
    file = started / "checkpoint"
    content = file.read_bytes()
    half = len(content) // 2
    damaged = {
        "flip": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "cut": content[:half],
        "empty": b"",
        "other": b"a note of the user's own\nwith another line\n",
    }[damage]
    file.write_bytes(damaged)
    command = (program, *TINY, "--steps", "1", "--out", started, text)
    message = r"the checkpoint must be a whole one of this program, got .*/checkpoint, which .*"
    assert_refused(finish(start(*command)), message)
    assert file.read_bytes() == damaged


def test_says_at_once_that_it_cannot_write(program: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("in the way")
    part = finish(start(program, *TINY, "--out", tmp_path / "note", text))
    message = f"train_lm: cannot write {tmp_path}/note/checkpoint: Not a directory\n"
    assert (part.error, part.lines, part.status) == (message, [], 1)
    assert (tmp_path / "note").read_text() == "in the way"
