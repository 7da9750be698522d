"""Fixtures of the tests that run training programs: a small text, a small model, short reports."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains: a folder of files, and one file."""
    folder = tmp_path_factory.mktemp("data")
    words = ["moon", "rose", "over", "quiet", "hills", "while", "seven", "grey", "wolves", "sang"]
    draw = random.Random(0)
    (folder / "notes").mkdir()
    for name in "abcdefgh":
        text = " ".join(draw.choice(words) for _ in range(400))
        (folder / "notes" / f"{name}.txt").write_text(text)
    (folder / "sums.txt").write_text("\n".join(f"{n}+{n}={2 * n}" for n in range(600)))
    (folder / "notes" / "picture.png").write_bytes(b"\x89PNG\0\xff" * 100)
    return [str(folder / "notes"), str(folder / "sums.txt")]


@pytest.fixture(scope="session")
def tiny(data: list[str]) -> list[str]:
    """Options of a run whose steps take milliseconds."""
    return [
        *("--layers", "2", "--hidden-size", "32", "--intermediate-size", "16", "--experts", "4"),
        *("--batch-tokens", "256", "--context", "32", "--threads", "1", "--data", *data),
    ]


@pytest.fixture(autouse=True)
def short_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's report draws nothing and writes short samples, which take longer than the run."""
    if request.node.get_closest_marker("whole_report") is None:
        monkeypatch.setattr("training.report.draw", lambda *_: [])
        monkeypatch.setattr("training.report.SAMPLE_BYTES", 4)


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Nothing is ignored of what a terminal sends, as it is where the tests run behind a script."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ignored = [number for number in defaults if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """Gives the process its number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
