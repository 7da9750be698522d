"""The geometry of a gate: angles, boundaries, distances and flips, against loops and by moving."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn
from torch.testing import assert_close

from torchmoe import ops
from torchmoe.monitor import RouterGeometry, geometry
from torchmoe.monitor._plane_figure import draw_plane, make_plane, make_regions, make_styles
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

H, E, T = 6, 5, 23
EPS = torch.finfo(torch.float64).eps

pytestmark = pytest.mark.usefixtures("one_thread")


def gate(rows: Any, bias: Any = None) -> nn.Linear:
    """A float64 gate with these rows."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(rows)
        if bias is not None:
            linear.bias.copy_(torch.as_tensor(bias, dtype=torch.float64))
    return linear


def drawn(experts: int = E, size: int = H, *, bias: bool = True) -> RouterGeometry:
    return geometry(gate(torch.randn(experts, size), 0.5 * torch.randn(experts) if bias else None))


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


# ---- the picture


def arrays(got: RouterGeometry) -> tuple[Any, Any]:
    return got.rows.numpy(), got.bias.numpy()


def test_plot(tmp_path: Path) -> None:
    got = drawn()
    path = tmp_path / "figures" / "plane.png"
    got.plot(path, torch.randn(2, 30, H))
    image = matplotlib.image.imread(path)
    height, width, _ = image.shape
    assert 1200 < height < width < 1800
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    got.plot(str(tmp_path / "plane.svg"))
    assert "<svg" in (tmp_path / "plane.svg").read_text()
    got.plot(tmp_path / "none.svg", torch.randn(0, H))
    assert "through 0" in draw_plane(*arrays(got), None).axes[0].get_title()


def test_the_plane_is_where_the_rows_differ() -> None:
    """Hand-made: differences along two axes, and something large that all rows have in common."""
    rows = np.array([[3.0, 0, 50, 0], [-3, 0, 50, 0], [0, 1, 50, 0], [0, -1, 50, 0]])
    tokens = np.array([[1.0, 2, 3, 4], [3, 2, 1, 0]])
    plane = make_plane(rows, np.array([1.0, 2, 3, 4]), tokens)
    assert_close(plane.directions, np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]), rtol=0, atol=1e-14)
    assert_close(plane.shares.tolist(), [0.9, 0.1], rtol=1e-12, atol=0)
    assert_close(plane.slopes, rows[:, :2], rtol=0, atol=1e-13)
    assert plane.middle.tolist() == [2, 2, 2, 2]
    logits = rows @ plane.middle + np.array([1.0, 2, 3, 4])
    assert_close(plane.heights, logits - logits.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("experts", "size"), [(2, 2), (2, 64), (3, 2), (8, 64), (32, 5), (5, 3)])
def test_the_plane_is_flat(experts: int, size: int) -> None:
    rows, bias = arrays(drawn(experts, size))
    tokens = np.random.default_rng(0).standard_normal((10, size))
    plane = make_plane(rows, bias, tokens)
    assert_close(plane.directions @ plane.directions.T, np.eye(2), rtol=0, atol=1e-12)
    assert 0 <= plane.shares[1] <= plane.shares[0] <= 1 + 1e-12
    variances = ((rows - rows.mean(0)) ** 2).sum()
    assert_close(plane.shares, (plane.slopes**2).sum(0) / variances, rtol=0, atol=1e-12)
    # Through the plane, the logits differ as those of the points that it shows.
    point = np.array([0.3, -0.7])
    logits = rows @ (plane.middle + point @ plane.directions) + bias
    assert_close(plane.slopes @ point + plane.heights, logits - logits.mean(), rtol=0, atol=1e-11)
    if experts == 2:
        # The second direction holds no difference: it is where the mean row points.
        assert plane.shares.tolist() == pytest.approx([1, 0])
        inside = rows @ plane.directions.T @ plane.directions
        assert_close(inside, rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_the_regions_are_where_experts_win(experts: int, bias: bool) -> None:
    rows, biases = arrays(drawn(experts, 7, bias=bias))
    plane = make_plane(rows, biases, None)
    regions = make_regions(plane, 2.0)
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 3000))
    wins = np.argmax(np.outer(plane.slopes[:, 0], x) + np.outer(plane.slopes[:, 1], y)
                     + plane.heights[:, None], axis=0)  # fmt: skip
    assert set(wins.tolist()) <= regions.keys()
    total = 0.0
    for expert, region in regions.items():
        after = np.roll(region.corners, -1, axis=0)
        inside = np.full(len(x), True)
        for (ax, ay), (bx, by) in zip(region.corners, after, strict=True):
            inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= -1e-9
            total += (ax * by - bx * ay) / 2
        assert (inside == (wins == expert)).all()
        for start, end, other in zip(region.corners, after, region.neighbours, strict=True):
            if other >= 0:
                between = plane.slopes @ ((start + end) / 2) + plane.heights
                assert between[other] == pytest.approx(between[expert], abs=1e-9)
            else:
                assert np.abs((start + end) / 2).max() == pytest.approx(2)
    assert total == pytest.approx(16)


def test_equal_experts_share_no_region() -> None:
    same = np.ones((3, 2))
    plane = make_plane(same, np.zeros(3), None)
    assert plane.shares.tolist() == [0, 0]
    assert list(make_regions(plane, 1.0)) == [0]
    assert list(make_regions(make_plane(same, np.array([0, 0, 1.0]), None), 1.0)) == [2]
    FigureCanvasAgg(draw_plane(same, np.zeros(3), np.ones((1, 2)))).draw()


@pytest.mark.parametrize("experts", [9, 32, 64, 100])
def test_neighbours_differ_in_colour_and_experts_in_style(experts: int) -> None:
    # On a circle every expert has a region, and the last one is in the middle of all of them.
    angles = np.linspace(0, 2 * np.pi, experts, endpoint=False)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows[-1] = 0
    bias = np.zeros(experts)
    bias[-1] = 0.5
    regions = make_regions(make_plane(rows, bias, None), 2.0)
    assert len(regions) == experts
    styles = make_styles(experts, regions)
    for expert, region in regions.items():
        for other in region.neighbours:
            assert other < 0 or styles[expert].colour != styles[other].colour
    assert len(set(styles)) >= min(experts, 56)


@pytest.mark.parametrize(
    ("experts", "size", "tokens"),
    [(2, 64, 5), (3, 2, 0), (3, 64, 1), (8, 2, 400), (8, 64, 7001), (32, 2, 400), (64, 64, 400)],
)
def test_pictures_of_any_size(experts: int, size: int, tokens: int) -> None:
    rows, bias = arrays(drawn(experts, size))
    x = np.random.default_rng(0).standard_normal((tokens, size)) if tokens else None
    figure = draw_plane(rows, bias, x)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axes,) = figure.axes
    assert axes.get_xlim() == axes.get_ylim()
    # Nothing runs out of the picture, and each expert has a number next to its arrow.
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
    for box in [text.get_window_extent(renderer) for text in texts]:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    frame = axes.get_window_extent(renderer)
    labels = [text for text in axes.texts if text.get_fontweight() == "bold"]
    assert [text.get_text() for text in labels] == [str(expert) for expert in range(experts)]
    boxes = [label.get_window_extent(renderer) for label in labels]
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    overlapping = sum(a.overlaps(b) for a in boxes for b in boxes) - experts
    assert overlapping <= experts / 8
    dots = sum(len(part.get_offsets()) for part in axes.collections)
    assert dots == (tokens if tokens <= 3000 else 2334)
    assert ("2334 of 7001 tokens" in axes.get_title()) is (tokens == 7001)
    assert len(figure.legends) == (tokens > 0)
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert frame.x1 < box.x0 < box.x1 <= figure.bbox.x1
        shown = [int(text.get_text()) for text in legend.get_texts()]
        few = x if tokens <= 3000 else x[::3]
        assert shown == sorted(set(np.argmax(few @ rows.T + bias, axis=1).tolist()))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torchmoe.monitor._plane_figure")
    message = r"geometry: plot needs matplotlib: pip install 'torchmoe\[watch\]'"
    with pytest.raises(ImportError, match=message):
        drawn().plot(tmp_path / "plane.png")


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


@pytest.mark.parametrize(
    ("rows", "bias", "x", "message"),
    [
        ([[1, 2]], None, None, "plot must have two or more experts, got 1"),
        ([[1], [2]], None, None, "plot must have rows of two or more numbers, got 1"),
        (
            [[1, 2], [math.nan, 3]],
            None,
            None,
            "plot must have finite rows and biases, got inf or NaN",
        ),
        ([[1, 2], [4, 3]], [0, math.inf], None, "plot must have finite rows and biases"),
        ([[1, 2], [4, 3]], None, [[0, math.inf]], "plot must have finite x, got inf or NaN"),
    ],
)
def test_errors_of_plot(rows: Any, bias: Any, x: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^geometry: {message}"):
        geometry(gate(rows, bias)).plot(
            tmp_path / "plane.png", None if x is None else torch.tensor(x)
        )
    assert not list(tmp_path.iterdir())


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
