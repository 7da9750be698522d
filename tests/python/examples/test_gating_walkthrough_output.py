"""What the walkthrough prints and draws, and what a user can mend."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

import gating_walkthrough
import train_lm
from refused import refused
from training import checkpoint
from walkthrough import figure, sentences
from walkthrough.made_up import EXPERTS, POETRY
from walkthrough.steps import Story

# ---- what it prints


@pytest.fixture(scope="module")
def printed() -> str:
    """The program as a user starts it."""
    result = subprocess.run(
        [sys.executable, gating_walkthrough.__file__],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout


def test_prints_every_step(printed: str) -> None:
    titles = [
        "1. Five tokens become one gate input",
        "2. The gate scores the experts: z = W_g x + b_g",
        "3. The two best are chosen, and weighed",
        "4. How well does each expert match?",
        "5. The same gate, another text: a case to check by hand",
        "6. The balancing loss: N sum f P, lambda = 0.01",
        "7. What the gate learns: the straight-through gradient on W_g",
        "8. Its scaling by (1 - usage)",
        "9. Ten tasks in a row for one favourite: poetry",
        "10. The capacity factor: max(1, load / mean load)",
        "11. A refusal",
        "12. A memory of choices",
    ]
    places = [printed.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert "\x1b" not in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_prints_the_numbers(printed: str, story: Story) -> None:
    x = ", ".join(f"{value:.4f}" for value in story.pooling.gate_input.tolist())
    assert f"gate input x = sum of a_s h_s = [{x}]" in printed
    for i, name in enumerate(EXPERTS):
        rows = [row.split() for row in re.findall(rf"^ {i} {name} .*$", printed, re.MULTILINE)]
        scores, match, plain, scaled, room = rows
        assert scores[-2] == f"{story.decision.logits[i]:.4f}"
        assert scores[-1] == f"{story.decision.probabilities[i]:.2%}"
        assert match[2] == f"{story.decision.match[i]:.1f}%"
        assert plain[3:] == [
            f"{value:.4f}" for value in (story.gradient.logit_gradient[i], *story.gradient.plain[i])
        ]
        assert scaled[4:] == [f"{value:.4f}" for value in story.gradient.scaled[i]]
        assert room[3] == f"{story.room.factor[i]:.3f}"
    assert "logits = [3.2, 1.5, 0.8, 2.7, -0.3, 1.1, 4.5, 0.6]" in printed
    assert "top-2 = [6, 0]: science, then poetry" in printed
    assert "top-2 = [0, 6]: poetry, then science" in printed
    assert f"= {story.balance.loss:.4f}" in printed


def test_prints_the_ten_tasks(printed: str, story: Story) -> None:
    rows = re.findall(r"^ (\d+) +(0\.\d{3}) +(\d\.\d{4}) .* (0 6(?: 3)?) *$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    for row, task in zip(rows, story.row.tasks, strict=True):
        assert row[1:3] == (f"{task.usage[POETRY]:.3f}", f"{task.loss:.4f}")
        assert row[3] == " ".join(map(str, task.served_by))
    assert "The loss rises from 1.00 to 2.02" in printed
    assert "from task 7 on its backup, prose (3)," in printed


def test_says_what_is_made_up_and_what_is_refused(printed: str, story: Story) -> None:
    text = " ".join(printed.split())
    assert "the experts' names are made up" in text
    assert "the learning rate is large and usage quick" in text
    assert "Poetry refuses sentences 3 to 8 with even room, 7 to 8 with room by history." in text
    assert f"ValueError: {story.refusal}" in text


def test_prints_a_miss_a_hit_and_an_entry_that_no_longer_holds(printed: str, story: Story) -> None:
    rows = re.findall(r"^ .*?  +(-|\d\.\d{4}) +(miss|\d) +(\w+, \w+) +(\d)", printed, re.MULTILINE)
    assert [row[1] for row in rows] == ["miss", "0", "miss", "0", "miss"]
    assert [row[0] for row in rows] == [
        "-" if v.similarity is None else f"{v.similarity:.4f}" for v in story.memory.visits
    ]
    assert f"m = {story.memory.margin:.4f}" in printed


def test_cuts_no_number_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], printed: str
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert gating_walkthrough.main([]) == 0
    assert capsys.readouterr().out == printed


# ---- the figure


def test_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "picture.png"
    assert gating_walkthrough.main(["--figure", str(path)]) == 0
    output = capsys.readouterr().out
    for file in (path, path.with_suffix(".svg")):
        assert file.stat().st_size > 50_000
        assert f"figure: {file}" in output


def test_figure_has_a_default_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gating_walkthrough.main(["--figure"]) == 0
    assert (tmp_path / "runs" / "gating_walkthrough.png").is_file()
    capsys.readouterr()


def test_no_text_of_the_figure_overlaps_another(story: Story) -> None:
    drawn = figure.draw(story)
    drawn.draw_without_rendering()
    texts = {id(text): text for text in drawn.findobj(Text)}.values()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_visible() and text.get_text().strip()
    ]
    assert len(boxes) > 150
    for place, (name, box) in enumerate(boxes):
        for other_name, other in boxes[place + 1 :]:
            wide = min(box.x1, other.x1) - max(box.x0, other.x0)
            high = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert wide < 2 or high < 2, f"{name!r} overlaps {other_name!r}"


# ---- --text


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_text(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["the moon sang", "", "  7+7=14 ", "ü" * 16 + "7" * 48]
    text = write(tmp_path / "mine.txt", "\ufeff" + "\r\n".join(lines))
    assert gating_walkthrough.main(["--text", text, "--checkpoint", str(tiny_model)]) == 0
    output = capsys.readouterr().out
    assert "step-00000002.safetensors, 2 steps: 2 layers, top 2 of 4 experts in each" in output
    assert "even would be 25.0%" in output
    assert "sentence 3 has 80 bytes; the model's context holds 32, so the first 32 count" in output
    assert "sentence 1 has" not in output
    assert max(map(len, output.splitlines()[1:])) <= 100
    rows = re.findall(r"^.* (\d) +(\d) +([\d.]+)% +(\d+)% *$", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1"] * 3

    _, model = sentences.load_model(tiny_model)
    with torch.no_grad():
        for number, sentence in enumerate(("the moon sang", "7+7=14", "ü" * 16)):
            tokens = torch.tensor([list(sentence.encode())])
            for layer, routing in enumerate(model(tokens).routings):
                mean = routing.logits.softmax(dim=-1).mean(dim=0)
                best = int(mean.argmax())
                first = (routing.selected[:, 0] == best).double().mean().item()
                expected = (str(layer), str(best), f"{100 * mean[best]:.1f}", f"{100 * first:.0f}")
                assert rows[2 * number + layer] == expected


def test_a_sentence_cannot_move_the_cursor(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write(tmp_path / "mine.txt", "[bold]a\x1b[2Jb\tc[/nothing]\n" + "long " * 100)
    assert gating_walkthrough.main(["--text", text, "--checkpoint", str(tiny_model)]) == 0
    output = capsys.readouterr().out
    assert "[bold]a [2Jb c[/nothing]" in output
    assert "long long" in output
    assert "\x1b" not in output


def test_reads_a_hash_router(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hash"
    options = [*tiny, "--steps", "2", "--router", "hash", "--out", str(out)]
    assert train_lm.main(options) == 0
    text = write(tmp_path / "mine.txt", "the moon")
    assert gating_walkthrough.main(["--text", text, "--checkpoint", str(out)]) == 0
    assert "1  the moon" in capsys.readouterr().out


# ---- what the user can mend


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    output, error = refused(capsys, gating_walkthrough.main, *arguments)
    assert output == ""
    assert error.startswith("gating_walkthrough.py: error: ")
    return error


def test_refuses_text_that_it_cannot_read(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--checkpoint", str(tiny_model))
    missing = tmp_path / "missing.txt"
    assert f"--text: cannot read {missing}: No such" in fails(
        capsys, "--text", str(missing), *model
    )
    assert "--text: cannot read" in fails(capsys, "--text", str(tmp_path), *model)
    empty = write(tmp_path / "empty.txt", "\n  \n")
    assert "must have a sentence, got an empty file" in fails(capsys, "--text", empty, *model)
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert "is not UTF-8" in fails(capsys, "--text", str(tmp_path / "latin.txt"), *model)


def test_refuses_a_checkpoint_that_is_none(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = write(tmp_path / "mine.txt", "a sentence")
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, "--text", text)
    assert "--checkpoint: runs/lm is not there; make train leaves one in runs/lm" in error
    error = fails(capsys, "--text", text, "--checkpoint", str(tmp_path))
    assert "--checkpoint" in error
    assert "holds no checkpoint" in error
    error = fails(capsys, "--text", text, "--checkpoint", text)
    assert "is not a safetensors file" in error
    (file,) = checkpoint.in_order(tiny_model / "checkpoints")[-1:]
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    error = fails(capsys, "--text", text, "--checkpoint", str(tmp_path / "damaged.safetensors"))
    assert "is damaged" in error


def test_refuses_a_dense_model(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dense"
    options = [*tiny, "--steps", "2", "--feed-forward", "dense", "--out", str(out)]
    assert train_lm.main(options) == 0
    capsys.readouterr()
    text = write(tmp_path / "mine.txt", "a sentence")
    error = fails(capsys, "--text", text, "--checkpoint", str(out))
    assert "must hold a model with experts, got a dense one" in error


def test_refuses_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write(tmp_path / "mine.txt", "a sentence")
    assert "not allowed with" in fails(capsys, "--text", text, "--figure")
    assert "--checkpoint: must come with --text" in fails(capsys, "--checkpoint", "runs/lm")
    assert "--figure: must end in .png" in fails(capsys, "--figure", str(tmp_path / "a.jpg"))
    error = fails(capsys, "--figure", str(tmp_path / "mine.txt" / "a.png"))
    assert "--figure: cannot write to" in error
    assert "unrecognized" in fails(capsys, "--quick")
