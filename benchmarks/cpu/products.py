"""How near to the FMA peak is each of the six products of a step?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.clock import Run, timed
from benchmarks.contenders import Shape
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table

_ops = torch.ops.torchmoe


@dataclass(frozen=True)
class Product:
    """One product of a step, by ours and by one torch.mm over all rows."""

    ours: Callable[[], object]
    dense: Callable[[], object]
    flops: int


def balanced_offsets(rows: int, experts: int) -> Tensor:
    """Where each expert's rows begin when all have as many, or one more."""
    return torch.arange(experts + 1) * rows // experts


def products(shape: Shape) -> dict[str, Product]:
    """Each on operands of its own, balanced over the experts."""
    hidden, inner = shape.hidden, shape.intermediate
    x, pre, act, y = (torch.randn(shape.rows, n) for n in (hidden, 2 * inner, inner, hidden))
    w_in = torch.randn(shape.experts, 2 * inner, hidden)
    w_out = torch.randn(shape.experts, hidden, inner)
    offsets = balanced_offsets(shape.rows, shape.experts)
    forward = partial(_ops.grouped_linear.default, bias=None, expert_offsets=offsets)
    backward = partial(_ops._grouped_linear_backward.default, expert_offsets=offsets)
    to_rows, to_weight = [True, False, False], [False, True, False]
    mm = torch.mm
    wide = 4 * shape.rows * hidden * inner
    return {
        "pre-activation, NT": Product(partial(forward, x, w_in), partial(mm, x, w_in[0].t()), wide),
        "output, NT": Product(
            partial(forward, act, w_out), partial(mm, act, w_out[0].t()), wide // 2
        ),
        "grad activation, NN": Product(
            partial(backward, y, act, w_out, output_mask=to_rows),
            partial(mm, y, w_out[0]),
            wide // 2,
        ),
        "grad x, NN": Product(
            partial(backward, pre, x, w_in, output_mask=to_rows), partial(mm, pre, w_in[0]), wide
        ),
        "grad w_in, TN": Product(
            partial(backward, pre, x, w_in, output_mask=to_weight), partial(mm, pre.t(), x), wide
        ),
        "grad w_out, TN": Product(
            partial(backward, y, act, w_out, output_mask=to_weight),
            partial(mm, y.t(), act),
            wide // 2,
        ),
    }


def section_products(settings: Settings) -> Section:
    """A roofline of one roof: these sizes are bound by arithmetic, not by memory."""
    rows: list[list[str]] = []
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    for shape in settings.shapes:
        torch.manual_seed(0)
        members = products(shape)
        runs: dict[str, Run] = {}
        for name, product in members.items():
            runs[name] = timed(product.ours)
            runs[f"mm, {name}"] = timed(product.dense)
        block = settings.clock.measure(f"products, {shape}", runs)
        peak = block.peak()
        shares[str(shape)] = {}
        for name, product in members.items():
            ours = product.flops / block.times[name].low
            dense = product.flops / block.times[f"mm, {name}"].low
            shares[str(shape)][name] = (ours / peak, dense / peak)
            rates = [f"{rate / 1e9:.0f}" for rate in (ours, dense)]
            parts = [f"{rate / peak:.2f}" for rate in (ours, dense)]
            rows.append(
                [f"{shape}", name, rates[0], parts[0], rates[1], parts[1], f"{ours / dense:.2f}"]
            )
    header = ["T, H, I, E, K", "product", "GFLOP/s", "of peak", "mm GFLOP/s", "of peak", "over mm"]
    return Section(
        "The six products of a step",
        "`grouped_linear` and its backward with one gradient asked for, on balanced experts, "
        "next to one `torch.mm` over all rows, whose FLOPs are the same: fastest rounds, and their "
        "share of the FMA peak. N and T say whether a factor is read as it lies or transposed.",
        [table(header, rows, texts=2)],
        {"cpu_products.png": figures.products(shares)},
    )
