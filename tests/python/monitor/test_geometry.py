"""The geometry of a gate: angles, boundaries, distances and flips, against loops and by moving."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from geometry_case import E, H, T, drawn, gate
from torchmoe import ops
from torchmoe.monitor import RouterGeometry, geometry
from torchmoe.nn import (
    ContextRouter,
    CosineRouter,
    ExpertChoiceRouter,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
    WithAttachedLoss,
)

EPS = torch.finfo(torch.float64).eps

pytestmark = pytest.mark.usefixtures("one_thread")


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def slow_logits(got: RouterGeometry, z: list[float]) -> list[float]:
    return [dot(w, z) + b for w, b in zip(got.rows.tolist(), got.bias.tolist(), strict=True)]


def slow_choice(logits: list[float], top_k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:top_k]


def slow_flip(got: RouterGeometry, z: list[float], top_k: int) -> tuple[float, int, int]:
    rows, logits = got.rows.tolist(), slow_logits(got, z)
    best = (math.inf, -1, -1)
    chosen = slow_choice(logits, top_k)
    for c in chosen:
        for u in range(len(rows)):
            span = math.dist(rows[c], rows[u])
            if u not in chosen and span > 0 and (logits[c] - logits[u]) / span < best[0]:
                best = ((logits[c] - logits[u]) / span, c, u)
    return best


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

    # A difference of two logits is known to some 1e-15, which is not much beside 1e-9 of it here.
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


# ---- matches


def test_match_percentages() -> None:
    got, x = drawn(), 3 * torch.randn(T, H).double()
    percent = got.match_percentages(x)
    for t, z in enumerate(x.tolist()):
        for expert, row in enumerate(got.rows.tolist()):
            cosine = dot(z, row) / math.sqrt(dot(z, z) * dot(row, row))
            assert percent[t, expert].item() == pytest.approx(50 * (1 + cosine), abs=1e-12)


def test_matches_of_special_vectors() -> None:
    got = geometry(gate([[0.1, 0.7], [-0.2, -1.4], [0, 0], [-7, 1]], [5, 6, 7, 8]))
    percent = got.match_percentages(torch.tensor([[3.0, 21], [0, 0]]))
    assert_close(percent[0].tolist(), [100.0, 0.0, 50.0, 50.0], rtol=0, atol=1e-12)
    assert percent[1].tolist() == [50] * 4
    many = drawn(300)
    own = many.match_percentages(many.rows)
    assert own.max() <= 100
    assert many.match_percentages(-many.rows).min() >= 0
    assert_close(own.diagonal(), torch.full((300,), 100.0).double(), rtol=0, atol=1e-12)


# ---- shapes and dtypes of x


@pytest.mark.parametrize("leading", [(), (0,), (T,), (2, 3), (2, 0), (1, 2, 2)])
@pytest.mark.parametrize("cosine", [False, True])
def test_leading_dimensions_are_kept(leading: tuple[int, ...], cosine: bool) -> None:
    got = geometry(CosineRouter(H, E) if cosine else Router(H, E, bias=True))
    x = torch.randn(*leading, H)
    flat = x.reshape(-1, H)

    def check(of_x: Tensor, of_flat: Tensor, *last: int) -> None:
        assert of_x.shape == (*leading, *last)
        assert torch.equal(of_x.reshape(of_flat.shape), of_flat)

    check(got.logits(x), got.logits(flat), E)
    check(got.match_percentages(x), got.match_percentages(flat), E)
    check(got.distance(x, 0, 1), got.distance(flat, 0, 1))
    for top_k in (2, E):
        flips = zip(got.flip_distances(x, top_k), got.flip_distances(flat, top_k), strict=True)
        for one, other in flips:
            check(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_x_of_any_dtype_is_widened(dtype: torch.dtype) -> None:
    got, x = drawn(), torch.randn(T, H, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = got.logits(x)
    assert torch.equal(logits, got.logits(x.detach().double()))
    assert not logits.requires_grad
    assert not got.flip_distances(x, 2).distance.requires_grad


# ---- which routers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cosine_router_is_read_where_it_compares(dtype: torch.dtype) -> None:
    router = CosineRouter(H, E, projection_size=3, temperature=0.25, dtype=dtype)
    got, x = geometry(router), torch.randn(T, H, dtype=dtype)
    embeddings = router.embeddings.detach().double()
    rows = embeddings / embeddings.norm(dim=1, keepdim=True)
    tau = router.log_temperature.detach().double().exp()
    assert_close(got.rows, rows / tau, rtol=1e-14, atol=0)
    assert got.bias.tolist() == [0] * E
    z = x.double() @ router.projection.detach().double().T
    z = z / z.norm(dim=1, keepdim=True)
    assert_close(got.logits(x), z @ rows.T / tau, rtol=0, atol=1e-13)
    if dtype != torch.bfloat16:
        assert_close(got.logits(x).to(dtype), router(x).detach())
        assert_close(got.match_percentages(x).to(dtype), router.match_percentages(x))
    assert not got.logits(x).requires_grad
    # Along the sphere, a token reaches the boundary by turning by asin of the distance.
    distance, chosen, rival = got.flip_distances(x, 1)
    normal = got.rows[rival] - got.rows[chosen]
    normal = normal / normal.norm(dim=1, keepdim=True)
    sideways = normal - (normal * z).sum(1, keepdim=True) * z
    sideways = sideways / sideways.norm(dim=1, keepdim=True)
    for factor, changes in ((1 - 1e-6, False), (1 + 1e-6, True)):
        angle = (factor * distance.asin())[:, None]
        there = (angle.cos() * z + angle.sin() * sideways) @ got.rows.T
        assert torch.equal(there.argmax(1) != chosen, torch.full((T,), changes))


class Projecting(nn.Module):
    """A router of someone's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, H))  # not the experts'
        self.embedding = nn.Parameter(torch.randn(E, 2))

    @property
    def rows(self) -> Tensor:
        return 3 * self.embedding

    def project(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).tanh() + (9 if self.training else 0)


def test_any_module_with_rows_and_project() -> None:
    router, x = Projecting(), torch.randn(T, H)
    got = geometry(router)
    assert_close(got.logits(x).float(), ((x @ router.weight.T).tanh() @ router.rows.T).detach())
    assert router.training
    assert router.weight.requires_grad
    assert router.weight.dtype == torch.float32


class Wrapping(nn.Module):
    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        SequenceRouter,
        lambda router: ExpertChoiceRouter(router, 2),
        lambda router: Wrapping(Wrapping(router)),
    ],
)
def test_a_router_inside_another_is_found(wrap: Any, cosine: bool) -> None:
    router = CosineRouter(H, E) if cosine else Router(H, E, bias=True)
    x = torch.randn(T, H)
    got, expected = geometry(wrap(router)), geometry(router)
    assert torch.equal(got.rows, expected.rows)
    assert torch.equal(got.logits(x), expected.logits(x))


def test_the_router_of_a_layer_is_found() -> None:
    moe = MoE(H, 4, E, 2)
    got, x = geometry(moe), torch.randn(T, H)
    assert_close(got.logits(x).float(), moe(x).routing.logits.detach())


@pytest.mark.parametrize("cosine", [False, True])
def test_later_training_changes_nothing(cosine: bool) -> None:
    router = CosineRouter(H, E) if cosine else Router(H, E, bias=True, dtype=torch.float64)
    x = torch.randn(T, H)
    got = geometry(router)
    before = got.logits(x), got.rows.clone(), got.bias.clone()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(1)
    for one, other in zip(before, (got.logits(x), got.rows, got.bias), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(got.angles, geometry(router).angles)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        drawn().rows = torch.zeros(1)  # type: ignore[misc]


# ---- bad input


class Holding(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


NEEDED = (
    "geometry: router must have a weight [num_experts, hidden_size], or rows and project, "
    "or a router that has, got "
)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (HashRouter(E), NEEDED + "HashRouter"),
        (nn.ReLU(), NEEDED + "ReLU"),
        (Wrapping(nn.ReLU()), NEEDED + "Wrapping"),
        (Wrapping("linear"), NEEDED + "Wrapping"),
        (Holding(rows=torch.ones(2, 2)), NEEDED + "Holding"),
        (torch.ones(2, 3), NEEDED + "Tensor"),
        (
            nn.Conv1d(2, 3, 4),
            "geometry: router.weight must be [num_experts, hidden_size], got shape [3, 2, 4]",
        ),
        (
            Holding(weight=torch.ones(2, 2, dtype=torch.int64)),
            "geometry: router.weight must be a floating tensor, got torch.int64",
        ),
        (
            Holding(weight=torch.ones(2, 3), bias=torch.ones(3)),
            "geometry: router.bias must be [2], got shape [3]",
        ),
        (
            Holding(weight=torch.ones(2, 3), bias=True),
            "geometry: router.bias must be a floating tensor, got bool",
        ),
        (
            Holding(rows=torch.ones(2), project=torch.sin),
            "geometry: router.rows must be [num_experts, size], got shape [2]",
        ),
    ],
)
def test_routers_that_cannot_be_read(router: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        geometry(router)


@pytest.mark.parametrize("cosine", [False, True])
def test_errors_of_x(cosine: bool, tmp_path: Path) -> None:
    got = geometry(CosineRouter(H, E) if cosine else Router(H, E))
    methods = [
        got.logits,
        got.match_percentages,
        lambda x: got.distance(x, 0, 1),
        lambda x: got.flip_distances(x, 1),
        lambda x: got.plot(tmp_path / "plane.png", x),
    ]
    for method in methods:
        for shape in ((2, H + 1), (E,), ()):
            message = (
                f"geometry: x must be [..., hidden_size] = [..., {H}], got shape {list(shape)}"
            )
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                method(torch.ones(shape))
        with pytest.raises(RuntimeError, match=r"^geometry: x must be floating, got torch\.int64$"):
            method(torch.ones(2, H, dtype=torch.int64))
        with pytest.raises(RuntimeError, match=r"^geometry: x must be on cpu, got meta$"):
            method(torch.ones(2, H, device="meta"))
    assert not list(tmp_path.iterdir())


def test_errors_of_experts() -> None:
    got, x = drawn(), torch.ones(2, H)
    for call in (got.boundary, lambda i, j: got.distance(x, i, j)):
        with pytest.raises(IndexError, match=r"^geometry: i must be in \[0, 5\), got 5$"):
            call(5, 0)
        with pytest.raises(IndexError, match=r"^geometry: j must be in \[0, 5\), got -1$"):
            call(0, -1)
        with pytest.raises(
            ValueError, match=r"^geometry: j must be another expert than i, got 2 fo"
        ):
            call(2, 2)
        with pytest.raises(TypeError, match=r"^geometry: j must be an int, got 1\.0$"):
            call(0, 1.0)
    for top_k in (0, E + 1):
        with pytest.raises(
            ValueError, match=rf"^geometry: top_k must be in \[1, 5\], got {top_k}$"
        ):
            got.flip_distances(x, top_k)
    with pytest.raises(TypeError, match=r"^geometry: top_k must be an int, got True$"):
        got.flip_distances(x, True)


def test_the_layer_that_returns_one_tensor() -> None:
    moe = MoE(4, 2, 3, 2)
    assert torch.equal(geometry(WithAttachedLoss(moe)).rows, moe.router.weight.double())


def test_a_context_router_is_not_read_by_a_weight_of_its_own() -> None:
    class Neighbour(ContextRouter):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))  # of a token and the one before

    with pytest.raises(TypeError, match=r"geometry: router must have a weight .*, got Neighbour"):
        geometry(Neighbour())
