"""The life of a gate decision: each number against plain arithmetic, and --text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from walkthrough import made_up, steps
from walkthrough.decision import pool
from walkthrough.made_up import (
    BACKUP,
    EXPERTS,
    FIXED_INPUT,
    GATE_BIAS,
    GATE_WEIGHT,
    PARAPHRASED_MATRIX,
    POETRY,
    SCIENCE,
)
from walkthrough.steps import Story
from walkthrough_story import dot, logits_of, near, softmax, swiglu

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
    weights = softmax([dot(made_up.QUERY, token) / math.sqrt(4) for token in tokens])
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
    error = [a - b for a, b in zip(y, made_up.WANTED, strict=True)]
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
    slots = made_up.SLOTS_SO_FAR
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
            bias[i] -= made_up.LEARNING_RATE * to_z[i]
            for j in range(4):
                weight[i][j] -= made_up.LEARNING_RATE * (1 - usage[i]) * to_z[i] * x[j]
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


# ---- memory


def test_a_memory_of_choices(story: Story) -> None:
    memory, visits = story.memory, story.memory.visits
    sentence, other = story.pooling.gate_input.tolist(), list(FIXED_INPUT)
    paraphrase = pool(PARAPHRASED_MATRIX).gate_input.tolist()
    cosines = [cosine(paraphrase, sentence), cosine(other, sentence), 1.0, 1.0]
    assert visits[0].similarity is None
    assert [visit.similarity for visit in visits[1:]] == near(cosines)
    assert cosines[1] < memory.bound < cosines[0]
    lengths = [math.sqrt(dot(x, x)) for x in (sentence, paraphrase)]
    assert memory.bound < lengths[0] / lengths[1] < 1 / memory.bound
    logits = logits_of(sentence)
    ranked = sorted(range(8), key=lambda e: -logits[e])
    assert ranked[:3] == [POETRY, SCIENCE, memory.next_best]
    assert memory.margin == near(logits[SCIENCE] - logits[memory.next_best])
    assert [visit.entry for visit in visits] == [-1, 0, -1, 0, -1]
    first, last = [POETRY, SCIENCE], [POETRY, memory.next_best]
    assert [visit.chosen for visit in visits] == [first, first, [SCIENCE, POETRY], first, last]
    assert [visit.remembered for visit in visits] == [1, 1, 2, 2, 2]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
