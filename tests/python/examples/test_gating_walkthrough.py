"""The life of a gate decision: each number against plain arithmetic, and --text."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from torch import Tensor

import gating_walkthrough
import train_lm
from lm import checkpoint
from walkthrough import figure, sentences, steps
from walkthrough.steps import BACKUP, EXPERTS, GATE_BIAS, GATE_WEIGHT, POETRY, SCIENCE, Story

Vector = list[float]


@pytest.fixture(scope="module")
def story() -> Story:
    return steps.compute()


@pytest.fixture(scope="module")
def tiny_model(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert train_lm.main([*tiny, "--steps", "2", "--out", str(out)]) == 0
    return out


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: Sequence[float]) -> Vector:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def logits_of(
    x: Sequence[float],
    weight: Sequence[Sequence[float]] = GATE_WEIGHT,
    bias: Sequence[float] = GATE_BIAS,
) -> Vector:
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def near(expected: object) -> object:
    """Equal to what float64 leaves of it, numbers or lists of numbers."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def swiglu(expert: int, x: Sequence[float]) -> Vector:
    """What an expert of the story's layer answers, by hand."""
    layer = steps.make_layer(steps.make_router(usage_scaling=False), balance_weight=0.0)
    both = [dot(row, x) for row in layer.experts.gate_up_proj[expert].tolist()]
    gates, ups = both[: steps.INNER_SIZE], both[steps.INNER_SIZE :]
    inner = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)]
    return [dot(row, inner) for row in layer.experts.down_proj[expert].tolist()]


# ---- the fixed case


def test_fixed_case(story: Story) -> None:
    fixed = story.fixed
    assert fixed.gate_input.tolist() == [1.8, 0.7, 1.2, 0.9]
    logits = [3.2, 1.5, 0.8, 2.7, -0.3, 1.1, 4.5, 0.6]
    assert fixed.logits.tolist() == pytest.approx(logits, abs=1e-6)
    powers = [math.exp(logit) for logit in logits]
    p = [power / sum(powers) for power in powers]
    assert fixed.probabilities.tolist() == pytest.approx(p, abs=1e-9)
    assert fixed.chosen == [6, 0]
    assert fixed.weights.tolist() == pytest.approx([p[6] / (p[6] + p[0]), p[0] / (p[6] + p[0])])
    assert fixed.weights.tolist() == pytest.approx([0.7858, 0.2142], abs=5e-5)


def test_numbers_of_the_gate_are_short_enough_for_a_pencil() -> None:
    for value in (*GATE_BIAS, *(weight for row in GATE_WEIGHT for weight in row)):
        assert value == round(value, 2)
    assert len(GATE_WEIGHT) == len(GATE_BIAS) == len(EXPERTS) == len(set(EXPERTS)) == 8


# ---- one decision


def test_pooling(story: Story) -> None:
    pooling = story.pooling
    tokens = [
        [1.6, 0.8, -0.3, 2.1],
        [0.2, 1.5, 0.7, -0.4],
        [-0.5, 1.2, 0.9, 1.0],
        [2.3, -0.6, 1.8, 0.5],
        [1.1, 2.0, -1.2, 0.9],
    ]
    assert pooling.tokens.tolist() == tokens
    weights = softmax([dot(steps.QUERY, token) / math.sqrt(4) for token in tokens])
    assert pooling.weights.tolist() == near(weights)
    mean = [dot(weights, column) for column in zip(*tokens, strict=True)]
    assert pooling.gate_input.tolist() == near(mean)
    # Words with content count more than "a" and "about".
    assert min(weights[0], weights[3], weights[4]) > 1.5 * max(weights[1], weights[2])


def test_decision(story: Story) -> None:
    x, decision = story.pooling.gate_input.tolist(), story.decision
    logits = logits_of(x)
    assert decision.logits.tolist() == near(logits)
    p = softmax(logits)
    assert decision.probabilities.tolist() == near(p)
    assert decision.chosen == sorted(range(8), key=lambda i: -p[i])[:2] == [POETRY, SCIENCE]
    both = p[POETRY] + p[SCIENCE]
    assert decision.weights.tolist() == near([p[POETRY] / both, p[SCIENCE] / both])


def test_match(story: Story) -> None:
    for decision in (story.decision, story.fixed):
        x = decision.gate_input.tolist()
        length = math.sqrt(dot(x, x))
        match = [
            50 * (1 + dot(row, x) / (length * math.sqrt(dot(row, row)))) for row in GATE_WEIGHT
        ]
        assert decision.match.tolist() == near(match)
        # The story says that the first choice matches best.
        assert decision.match.argmax() == decision.chosen[0]


def test_balance(story: Story) -> None:
    p = softmax(logits_of(story.pooling.gate_input.tolist()))
    assert story.balance.fraction.tolist() == [0.5, 0, 0, 0, 0, 0, 0.5, 0]
    loss = 8 * (0.5 * p[POETRY] + 0.5 * p[SCIENCE])
    assert story.balance.loss == near(loss)
    assert story.balance.weighted == near(0.01 * loss)


# ---- what the gate learns


def test_answers_and_loss(story: Story) -> None:
    x, gradient = story.pooling.gate_input.tolist(), story.gradient
    answers = [swiglu(expert, x) for expert in (POETRY, SCIENCE)]
    assert gradient.answers.tolist() == [near(answer) for answer in answers]
    weights = story.decision.weights.tolist()
    y = [dot(weights, column) for column in zip(*answers, strict=True)]
    assert gradient.output.tolist() == near(y)
    error = [a - b for a, b in zip(y, steps.WANTED, strict=True)]
    assert gradient.output_gradient.tolist() == near(error)
    assert gradient.loss == near(dot(error, error) / 2)
    assert gradient.weight_gradient.tolist() == near([dot(error, answer) for answer in answers])


def test_straight_through_gradient(story: Story) -> None:
    x, gradient = story.pooling.gate_input.tolist(), story.gradient
    p = softmax(logits_of(x))
    error = gradient.output_gradient.tolist()
    to_p = [0.0] * 8  # dL/dp
    for expert in (POETRY, SCIENCE):
        to_p[expert] = dot(error, swiglu(expert, x))
    jacobian = [[p[i] * ((i == j) - p[j]) for j in range(8)] for i in range(8)]
    to_z = [sum(jacobian[i][j] * to_p[i] for i in range(8)) for j in range(8)]  # J^T dL/dp
    assert gradient.logit_gradient.tolist() == near(to_z)
    assert gradient.plain.tolist() == [near([g * value for value in x]) for g in to_z]
    assert all(g != 0 for g in to_z)  # those that were not chosen learn too


def test_it_is_not_the_exact_gradient(story: Story) -> None:
    """In the exact one p of the others cancels: dL/dz_i = w_i (g_i - sum of w_j g_j)."""
    weights, g = story.decision.weights.tolist(), story.gradient.weight_gradient.tolist()
    exact = weights[0] * (g[0] - dot(weights, g))
    assert story.gradient.logit_gradient[POETRY].item() != pytest.approx(exact, rel=0.1)


def test_scaling_by_usage(story: Story) -> None:
    gradient = story.gradient
    slots = steps.SLOTS_SO_FAR
    usage = [count / sum(slots) for count in slots]
    assert gradient.usage.tolist() == near(usage)
    scaled = [
        [(1 - share) * value for value in row]
        for share, row in zip(usage, gradient.plain.tolist(), strict=True)
    ]
    assert gradient.scaled.tolist() == [near(row) for row in scaled]
    assert max(usage) == usage[POETRY]


# ---- ten tasks in a row


def simulated(x: Sequence[float]) -> list[dict[str, object]]:
    """The ten tasks in plain Python."""
    weight, bias = [list(row) for row in GATE_WEIGHT], list(GATE_BIAS)
    usage, above, assisted = [1 / 8] * 8, 0, False
    found = []
    for _ in range(10):
        p = softmax(logits_of(x, weight, bias))
        order = sorted(range(8), key=lambda i: -p[i])[:2]
        served = [*order, BACKUP[order[0]]] if assisted else order
        loss = 8 * dot(usage, p)
        found.append(
            {
                "usage": usage,
                "p": p,
                "served": served,
                "loss": loss,
                "part": 8 * usage[POETRY] * p[POETRY],
                "w": p[POETRY] / sum(p[i] for i in served),
            }
        )
        mean = dot(usage, p)
        to_z = [0.01 * 8 * p[i] * (usage[i] - mean) for i in range(8)]
        for i in range(8):
            bias[i] -= steps.LEARNING_RATE * to_z[i]
            for j in range(4):
                weight[i][j] -= steps.LEARNING_RATE * (1 - usage[i]) * to_z[i] * x[j]
        usage = [0.9 * usage[i] + 0.1 * (0.5 if i in order else 0.0) for i in range(8)]
        above = above + 1 if usage[POETRY] > 2 / 8 else 0
        assisted = assisted or above >= 3
    return found


def test_ten_tasks(story: Story) -> None:
    expected = simulated(story.pooling.gate_input.tolist())
    tasks = story.row.tasks
    assert len(tasks) == len(expected) == 10
    for task, wanted in zip(tasks, expected, strict=True):
        assert task.usage.tolist() == near(wanted["usage"])
        assert task.probabilities.tolist() == near(wanted["p"])
        assert task.served_by == wanted["served"]
        assert task.loss == near(wanted["loss"])
        assert task.part == near(wanted["part"])
        assert task.weight == near(wanted["w"])
        assert task.weighted == near(0.01 * task.loss)


def test_loss_rises_share_falls_backup_joins(story: Story) -> None:
    tasks = story.row.tasks
    for before, after in pairwise(tasks):
        assert after.loss > before.loss
        assert after.part > before.part
        assert after.usage[POETRY] > before.usage[POETRY]
    # From even use the first step moves nothing.
    assert tasks[0].loss == near(1.0)
    assert tasks[1].probabilities.tolist() == near(tasks[0].probabilities.tolist())
    for before, after in pairwise(tasks[1:]):
        assert after.probabilities[POETRY] < before.probabilities[POETRY]
        assert after.weight < before.weight
    assert [task.served_by for task in tasks] == [[0, 6]] * 6 + [[0, 6, 3]] * 4
    assert BACKUP[POETRY] == 3


def test_the_same_numbers_again(story: Story) -> None:
    again = steps.compute()
    assert again.row.tasks[-1].loss == story.row.tasks[-1].loss
    assert torch.equal(again.gradient.plain, story.gradient.plain)


# ---- capacity and refusal


def test_capacity(story: Story) -> None:
    room, usage = story.room, story.row.usage.tolist()
    factor = [max(1.0, share * 8 / sum(usage)) for share in usage]
    assert room.factor.tolist() == pytest.approx(factor, abs=1e-3)
    assert all(shown >= exact - 1e-9 for shown, exact in zip(room.factor, factor, strict=True))
    assert room.even == 2
    assert room.capacity.tolist() == [math.ceil(f * 16 / 8 - 1e-9) for f in factor]
    assert room.capacity[POETRY] == 6


def test_a_full_expert_refuses(story: Story) -> None:
    room = story.room
    assert room.wanted.tolist() == [[POETRY, SCIENCE]] * 8
    assert room.served_evenly.tolist() == served(room.wanted, [2] * 8)
    assert room.served.tolist() == served(room.wanted, room.capacity.tolist())
    assert (room.served == -1).sum() == 4


def served(wanted: Tensor, room: Sequence[int]) -> list[list[int]]:
    """First choices first, in order, while there is room."""
    left, result = list(room), wanted.tolist()
    for choice in range(wanted.shape[1]):
        for row in result:
            if left[row[choice]] > 0:
                left[row[choice]] -= 1
            else:
                row[choice] = -1
    return result


def test_the_library_refuses_and_names_the_way_out(story: Story) -> None:
    assert 'must be "straight_through", or normalize "none"' in story.refusal
    assert "gradient is zero everywhere" in story.refusal


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
    with pytest.raises(SystemExit) as exit_info:
        gating_walkthrough.main(list(arguments))
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("gating_walkthrough.py: error: ")
    return output.err


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
