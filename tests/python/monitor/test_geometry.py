"""The geometry of a gate: angles, boundaries, distances and flips, against loops and by moving."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from geometry_case import E, H, T, drawn, gate
from slow_geometry import EPS, dot, slow_flip
from torchmoe import ops
from torchmoe.monitor import geometry
from torchmoe.nn import (
    Router,
)

# ---- rows and angles


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Router, nn.Linear])
def test_the_rows_are_the_weights(kind: type[nn.Module], dtype: torch.dtype, bias: bool) -> None:
    router = kind(H, E, bias=bias, dtype=dtype)
    got = geometry(router)
    assert torch.equal(got.rows, router.weight.double())
    assert torch.equal(got.bias, router.bias.double() if bias else torch.zeros(E).double())
    x = torch.randn(T, H, dtype=dtype)
    for value in (got.rows, got.bias, got.norms, got.angles, got.logits(x), got.distance(x, 0, 1)):
        assert value.dtype == torch.float64
        assert not value.requires_grad
    expected = x.double() @ router.weight.double().T
    expected = expected + router.bias.double() if bias else expected
    assert_close(got.logits(x), expected.detach(), rtol=0, atol=20 * EPS)
    assert repr(got) == f"RouterGeometry({E} experts, rows of {H})"


@pytest.mark.parametrize("experts", [1, E, 40])
def test_norms_and_angles(experts: int) -> None:
    got = drawn(experts)
    rows = got.rows.tolist()
    norms = [math.sqrt(dot(row, row)) for row in rows]
    assert_close(got.norms.tolist(), norms, rtol=10 * EPS, atol=0)
    assert torch.equal(got.angles.diagonal(), torch.zeros(experts).double())
    for i in range(experts):
        for j in range(experts):
            if i != j:
                angle = math.degrees(math.acos(dot(rows[i], rows[j]) / norms[i] / norms[j]))
                assert got.angles[i, j].item() == pytest.approx(angle, abs=1e-9)


@pytest.mark.parametrize("small", [1e-3, 1e-7, 1e-11])
def test_angles_near_0_and_180_keep_their_digits(small: float) -> None:
    """atan(small) = small to within small^3 / 3; cos(1e-11) is 1."""
    angles = geometry(gate([[2, 0], [3, 3 * small], [-5, 0], [-1, -small]])).angles
    expected = math.degrees(math.atan(small))
    # Directions are known to some eps.
    atol = math.degrees(4 * EPS)
    assert angles[0, 1].item() == pytest.approx(expected, rel=0, abs=atol)
    assert angles[0, 2].item() == 180
    assert 180 - angles[0, 3].item() == pytest.approx(expected, rel=0, abs=180 * 4 * EPS + atol)
    assert angles[2, 3].item() == pytest.approx(expected, rel=0, abs=atol)


def test_a_zero_row_has_no_angle() -> None:
    got = geometry(gate([[1, 0], [0, 0], [0, 2]]))
    nan = math.nan
    expected = torch.tensor([[0, nan, 90], [nan, nan, nan], [90, nan, 0]]).double()
    assert_close(got.angles, expected, equal_nan=True, rtol=0, atol=1e-13)
    assert got.norms.tolist() == [1, 0, 2]


# ---- boundaries


def test_a_boundary_has_equal_logits_and_a_positive_side() -> None:
    got, x = drawn(), torch.randn(T, H).double()
    for i in range(E):
        for j in range(E):
            if i == j:
                continue
            normal, offset = got.boundary(i, j)
            assert torch.equal(normal, got.rows[i] - got.rows[j])
            assert offset.item() == got.bias[i].item() - got.bias[j].item()
            distance = got.distance(x, i, j)
            assert torch.equal(distance, -got.distance(x, j, i))
            logits = got.logits(x)
            assert torch.equal(distance > 0, logits[:, i] > logits[:, j])
            on = got.logits(x - distance[:, None] * normal / normal.norm())
            assert_close(on[:, i], on[:, j], rtol=0, atol=200 * EPS)


def test_distances_by_hand() -> None:
    got = geometry(gate([[3, 0], [0, 4], [3, 0], [3, 0]], [0, 5, 2, 2]))
    x = torch.tensor([[0.0, 0], [3, 1], [-1, 0.5]])
    # (3, -4) . x - 5 over 5
    assert got.distance(x, 0, 1).tolist() == [-1, 0, -2]
    assert got.distance(x, 0, 2).tolist() == [-math.inf] * 3
    assert got.distance(x, 2, 0).tolist() == [math.inf] * 3
    assert got.distance(x, 2, 3).tolist() == [0] * 3


def test_a_distance_near_the_boundary_keeps_its_digits() -> None:
    """The logits are 1e8, so that their difference would be off by 1e-8."""
    got = geometry(gate([[1e8, 1], [1e8, -1]]))
    distance = got.distance(torch.tensor([1, 1e-10], dtype=torch.float64), 0, 1)
    assert distance.item() == pytest.approx(1e-10, rel=1e-12, abs=0)


# ---- flips


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (E, 1), (E, 2), (E, E - 1), (40, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_flips_by_loops(experts: int, top_k: int, bias: bool) -> None:
    got, x = drawn(experts, bias=bias), torch.randn(T, H).double()
    flips = got.flip_distances(x, top_k)
    assert flips.chosen.dtype == flips.rival.dtype == torch.int64
    for t, z in enumerate(x.tolist()):
        distance, chosen, rival = slow_flip(got, z, top_k)
        assert flips.distance[t].item() == pytest.approx(distance, rel=1e-9, abs=100 * EPS)
        assert (flips.chosen[t].item(), flips.rival[t].item()) == (chosen, rival)


def chosen_sets(logits: Tensor, top_k: int) -> Tensor:
    """[T, K] sorted ids, by a stable sort of its own."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k].sort(dim=1).values


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_set_changes_at_the_distance_and_not_before(top_k: int) -> None:
    got, x = drawn(), torch.randn(200, H).double()
    distance, chosen, rival = got.flip_distances(x, top_k)
    way = got.rows[rival] - got.rows[chosen]
    way = way / way.norm(dim=1, keepdim=True)
    before = chosen_sets(got.logits(x), top_k)

    def moved(factor: float) -> Tensor:
        return chosen_sets(got.logits(x + (factor * distance)[:, None] * way), top_k)

    # A difference of two logits is known to some 1e-15, which is small next to 1e-9 of it here.
    assert distance.min() > 1e-4
    assert torch.equal(moved(1 - 1e-9), before)
    after = moved(1 + 1e-9)
    assert (after != before).any(dim=1).all()
    for t in range(len(x)):
        expected = {*before[t].tolist(), rival[t].item()} - {chosen[t].item()}
        assert set(after[t].tolist()) == expected


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_no_shorter_way_changes_the_set(top_k: int) -> None:
    got = drawn(size=3)
    x = torch.randn(20, 3).double()
    distance = got.flip_distances(x, top_k).distance
    before = chosen_sets(got.logits(x), top_k)
    found = torch.zeros(20, dtype=torch.bool)
    for _ in range(2000):
        way = torch.randn(20, 3).double()
        way = way / way.norm(dim=1, keepdim=True) * distance[:, None]
        assert torch.equal(chosen_sets(got.logits(x + (1 - 1e-9) * way), top_k), before)
        # The search is fine enough to find what is a little longer.
        found |= (chosen_sets(got.logits(x + 1.2 * way), top_k) != before).any(dim=1)
    assert found.all()


def test_flips_by_hand() -> None:
    got = geometry(gate([[1, 0], [-1, 0], [0, 1]]))
    x = torch.tensor([[3.0, 1], [0.5, -4], [-2, -2], [0, 0]])
    flips = got.flip_distances(x, 1)
    assert_close(flips.distance.tolist(), [math.sqrt(2), 0.5, 2.0, 0.0], rtol=4 * EPS, atol=0)
    assert flips.chosen.tolist() == [0, 0, 1, 0]
    # The last token is on all boundaries: the tie goes to the lower id, here and below.
    assert flips.rival.tolist() == [2, 1, 0, 1]


def test_equally_near_exchanges_come_in_order() -> None:
    """The first choice is lost before the second; of rivals, the lower id comes in."""
    got = geometry(gate([[0, -1], [0, 1], [-1, 0], [1, 0]], [0, 0, 0.5, 0.5]))
    flips = got.flip_distances(torch.tensor([[2.0, 2]]), 2)
    # Logits -2, 2, -1.5, 2.5: over the span of 2, expert 1 to 0 and 3 to 2 are as near.
    assert flips.distance[0].item() == 2
    assert (flips.chosen[0].item(), flips.rival[0].item()) == (3, 2)
    flips = geometry(gate([[0, 1], [0, -1], [1, 0]])).flip_distances(torch.tensor([3.0, 0]), 1)
    assert (flips.chosen.item(), flips.rival.item()) == (2, 0)


def test_experts_with_equal_rows_never_change_places() -> None:
    got = geometry(gate([[1, 0], [1, 0], [0, 2]], [0, 0, -9]))
    x = torch.tensor([[1.0, 0]])
    flips = got.flip_distances(x, 1)
    assert (flips.chosen.item(), flips.rival.item()) == (0, 2)
    assert flips.distance.item() == pytest.approx(10 / math.sqrt(5))
    same = geometry(gate([[1, 0], [1, 0], [1, 0]], [0, 1, 0]))
    flips = same.flip_distances(x, 2)
    assert (flips.distance.item(), flips.chosen.item(), flips.rival.item()) == (math.inf, -1, -1)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (E, E)])
def test_with_all_experts_chosen_nothing_flips(experts: int, top_k: int) -> None:
    flips = drawn(experts).flip_distances(torch.randn(T, H), top_k)
    assert flips.distance.tolist() == [math.inf] * T
    assert flips.chosen.tolist() == flips.rival.tolist() == [-1] * T


def test_many_tokens_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    got, x = drawn(), torch.randn(T, H)
    whole = got.flip_distances(x, 2)
    monkeypatch.setattr(sys.modules["torchmoe.monitor.geometry"], "_BLOCK", 4 * 2 * E)
    sizes = []

    def recording(scores: Tensor, top_k: int) -> Tensor:
        sizes.append(len(scores))
        return select_experts(scores, top_k)

    select_experts = ops.select_experts
    monkeypatch.setattr(ops, "select_experts", recording)
    for one, other in zip(whole, got.flip_distances(x, 2), strict=True):
        assert torch.equal(one, other)
    assert sizes == [4] * 5 + [3]


def test_a_token_without_numbers_has_no_exchange() -> None:
    flips = drawn().flip_distances(torch.tensor([[math.nan] * H]), 2)
    assert math.isnan(flips.distance.item())
    assert (flips.chosen.item(), flips.rival.item()) == (-1, -1)
