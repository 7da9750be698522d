"""What a lookup costs and what it saves: seconds of a layer in evaluation whose every lookup hits.

Shapes: T tokens, R gate inputs, H hidden size, E experts, L tables of a cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from benchmarks.clock import interleave, timed
from studies.routing_cache.caching import compared, put_caches
from studies.routing_cache.scale import USUAL, Scale
from studies.routing_cache.text import loss
from torchmoe import RoutingCache
from torchmoe.nn import Balance, MoE, Router, SequenceRouter
from training.figures import Values
from training.language_model import LanguageModel

INTERMEDIATE, TOP_K, DEEP_HIDDEN, DEEP_EXPERTS = 256, 2, 256, 8
FOR_A_KEY = 4  # multiplications for each of a key's numbers, those of the distance among them
POOLINGS = ("mean", "attention")
SHORTEST, MOST = 0.5, 100  # seconds up to which quick ones get further rounds, and how many
LINEAR, DEEP, POOLED, TEXT = "linear", "mlp", "pooled", "text"


@dataclass(frozen=True)
class Case:
    """One layer, and its fastest rounds in seconds."""

    group: str
    name: str
    gate_inputs: int
    """R."""
    multiplications: int
    """Of the router, for each gate input."""
    compared: float
    """Keys that a lookup compares with a gate input."""
    lookup_multiplications: float
    """Of the hyperplanes and of those comparisons, for each gate input."""
    parameters: int
    """Of the router, each of which a lookup compares with its copy."""
    router: float
    """Logits, selection and weights: what a hit leaves out."""
    lookup: float
    """What finds an entry, its ids and its weights."""
    update: float
    """What moves the cache afterwards."""
    without: float
    """The whole layer without a cache."""
    with_cache: float
    """The whole layer with one, without the update."""

    @property
    def ratio(self) -> float:
        """The time of the layer with a cache over that without."""
        return self.with_cache / self.without

    @property
    def updated_ratio(self) -> float:
        """The same where the cache is updated after each call."""
        return (self.with_cache + self.update) / self.without

    @property
    def work(self) -> float:
        """The router's multiplications over the lookup's."""
        return self.multiplications / self.lookup_multiplications


def study(scale: Scale, model: LanguageModel, windows: Tensor) -> list[Case]:
    """Every case.

    Args:
        scale: of the study.
        model: a trained language model, whose gate inputs are not spread as random ones are.
        windows: text for it, [B, context + 1].
    """
    return [
        *linear_cases(scale),
        *deep_cases(scale),
        *pooled_cases(scale),
        *text_cases(scale, model, windows),
    ]


def linear_cases(scale: Scale) -> Iterable[Case]:
    """The usual router in several sizes."""
    for tokens in scale.tokens:
        for hidden in scale.hidden:
            for experts in scale.experts:
                torch.manual_seed(0)
                layer = make_layer(Router(hidden, experts), hidden, experts)
                name = f"T {tokens}, H {hidden}, E {experts}"
                yield measure(LINEAR, name, layer, torch.randn(tokens, hidden), scale)


def deep_cases(scale: Scale) -> Iterable[Case]:
    """A router of two inner layers, ever wider."""
    for tokens in scale.deep_tokens:
        for width in scale.widths:
            torch.manual_seed(0)
            router = nn.Sequential(
                nn.Linear(DEEP_HIDDEN, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, DEEP_EXPERTS),
            )
            layer = make_layer(router, DEEP_HIDDEN, DEEP_EXPERTS)
            x = torch.randn(tokens, DEEP_HIDDEN)
            yield measure(DEEP, f"T {tokens}, width {width}", layer, x, scale)


def pooled_cases(scale: Scale) -> Iterable[Case]:
    """One decision for each long sequence."""
    for pooling in POOLINGS:
        for length in scale.lengths:
            torch.manual_seed(0)
            router = SequenceRouter(Router(DEEP_HIDDEN, DEEP_EXPERTS), pooling=pooling)
            layer = make_layer(router, DEEP_HIDDEN, DEEP_EXPERTS)
            x = torch.randn(scale.pooled_tokens // length, length, DEEP_HIDDEN)
            yield measure(POOLED, f"pooled {pooling}, S {length}", layer, x, scale)


def text_cases(scale: Scale, model: LanguageModel, windows: Tensor) -> Iterable[Case]:
    """The layers of a language model on what they get of a text."""
    model = copy.deepcopy(model)
    put_caches(model, lambda: RoutingCache(1))  # so that the gate inputs are told
    _, output = loss(model, windows)
    for place, (moe, routing) in enumerate(zip(model.moes, output.routings, strict=True)):
        layer = make_layer(moe.router, moe.hidden_size, moe.num_experts)
        x = routing.details["gate_input"].detach()
        yield measure(TEXT, f"text layer {place}, T {len(x)}", layer, x, scale)


def make_layer(router: nn.Module, hidden: int, experts: int) -> MoE:
    """In evaluation, and without a balancing loss, which a layer whose router is left out lacks."""
    return MoE(hidden, INTERMEDIATE, experts, TOP_K, balance=Balance(0), router=router).eval()


@torch.no_grad()
def measure(group: str, name: str, layer: MoE, x: Tensor, scale: Scale) -> Case:
    """Times one layer, with a cache that holds an entry for each gate input and without."""
    cached, tokens = copy.deepcopy(layer), x.shape[:-1].numel()
    cache = cached.cache = RoutingCache(tokens, USUAL, reuse="weights")
    cache.update(cached(x).routing)
    routing = cached(x).routing
    assert (routing.details["cache_hit"] >= 0).all()
    gate_input = routing.details["gate_input"].flatten(0, -2)
    scoring = layer.router.router if isinstance(layer.router, SequenceRouter) else layer.router
    each = tokens // len(gate_input)

    def route() -> Tensor:
        logits = scoring(gate_input).repeat_interleave(each, dim=0) if each > 1 else scoring(x)
        ids = layer.estimator.select(logits, selection_bias=None, token_mask=None)
        return layer.estimator.weigh(logits, ids)

    def look_up() -> object:
        recall = cache.recall(None, tokens)
        recall(scoring, gate_input)
        return recall.found()

    runs = {
        "router": timed(route),
        "lookup": timed(look_up),
        "update": timed(lambda: cache.update(routing)),
        "without": timed(lambda: layer(x)),
        "with_cache": timed(lambda: cached(x)),
    }
    for run in runs.values():  # what a first call sets up
        run()
    seconds = sum(run() for run in runs.values())
    times = interleave(runs, max(scale.rounds, min(MOST, int(SHORTEST / seconds))))
    width = gate_input.shape[1]
    planes = cache.state_dict()["planes"].numel()
    keys = compared(cache, gate_input)
    matrices = [p.numel() for p in scoring.parameters() if p.dim() > 1]
    return Case(
        group,
        name,
        len(gate_input),
        sum(matrices),
        keys,
        planes + FOR_A_KEY * keys * width,
        sum(p.numel() for p in layer.router.parameters()),
        **{key: some.low for key, some in times.items()},
    )


# ---- where it pays


class Costs(NamedTuple):
    """Seconds; what a router and a lookup take is taken for a sum of these."""

    call: float
    """Of calling a router."""
    multiplication: float
    """One of a router's."""
    lookup_call: float
    """Of looking up."""
    gate_input: float
    """Of looking one up."""
    parameter: float
    """Of comparing one of the router's with its copy."""

    def router(self, gate_inputs: int, multiplications: float) -> float:
        """What a router takes for so many gate inputs."""
        return self.call + gate_inputs * multiplications * self.multiplication

    def lookup(self, gate_inputs: int, parameters: float) -> float:
        """What a lookup takes."""
        by_row = gate_inputs * self.gate_input
        return self.lookup_call + by_row + parameters * self.parameter

    def break_even(self, gate_inputs: int) -> float:
        """The multiplications per gate input, as many as parameters, from which it pays.

        Infinite where comparing a parameter takes as long as its products.
        """
        saved = gate_inputs * self.multiplication - self.parameter
        if saved <= 0:
            return math.inf
        fixed = self.lookup_call - self.call
        return max(0.0, (fixed + gate_inputs * self.gate_input) / saved)

    def ratio(self, case: Case) -> float:
        """What the time of the layer with a cache over that without ought to be."""
        lookup = self.lookup(case.gate_inputs, case.parameters)
        return 1 + (lookup - self.router(case.gate_inputs, case.multiplications)) / case.without


def costs_of(cases: Sequence[Case]) -> Costs:
    """Least squares of relative errors, from the times of routers and of lookups alone."""
    ones = np.ones(len(cases))
    rows = np.array([case.gate_inputs for case in cases], dtype=np.float64)
    products = rows * [case.multiplications for case in cases]
    parameters = np.array([case.parameters for case in cases], dtype=np.float64)
    router = fit([ones, products], [case.router for case in cases])
    lookup = fit([ones, rows, parameters], [case.lookup for case in cases])
    return Costs(*router, *lookup)


def fit(columns: Sequence[Values], seconds: Sequence[float]) -> list[float]:
    """What each column costs, none of them less than nothing."""
    matrix = np.stack(columns, axis=1) / np.array(seconds)[:, None]
    scale = matrix.max(axis=0)  # they are of very different sizes
    found, _ = nnls(matrix / scale, np.ones(len(seconds)))
    return [float(value) for value in found / scale]


def measured_break_even(cases: Sequence[Case]) -> float:
    """The router's multiplications at which the layer takes as long with a cache as without.

    Between two routers on a line over the logarithm; NaN where all or none of them pay.

    Args:
        cases: of the same gate inputs, the smallest router first.
    """
    for less, more in pairwise(cases):
        if less.ratio >= 1 > more.ratio:
            share = (less.ratio - 1) / (less.ratio - more.ratio)
            ends = math.log(less.multiplications), math.log(more.multiplications)
            return math.exp((1 - share) * ends[0] + share * ends[1])
    return math.nan


def by_gate_inputs(cases: Iterable[Case]) -> Mapping[int, list[Case]]:
    """The cases of each number of gate inputs, in their order."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.gate_inputs, []).append(case)
    return groups
