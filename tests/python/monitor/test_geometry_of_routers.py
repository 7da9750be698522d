"""The geometry of every router and input, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from float_types import NARROW
from geometry_case import E, H, T, drawn, gate
from slow_geometry import dot
from torchmoe.monitor import geometry
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


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
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
