"""How far each estimator's router gradient is from the dense mixture's, and what it costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

from torchmoe._checks import check_at_least, check_callable, shown
from torchmoe.nn import MoE
from torchmoe.nn._compatibility import Parts, check_pairs
from torchmoe.nn._layers import untrained_copy
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.registry import build_estimator, known_estimators
from torchmoe.nn.routers.context_router import route
from torchmoe.testing._observation import same_draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EstimatorComparison", "EstimatorResult", "compare_estimators"]

# Another process may disturb one round; the fastest of ten is close to what the work itself takes.
_ROUNDS = 10

_MIB = 2**20

# Told apart by people who do not see all colours (Okabe and Ito).
_BLUE, _ORANGE = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class EstimatorResult:
    """The measurements of one estimator.

    The first four values are means over the batches. For a batch, g* is the dense mixture's
    gradient and g_s the estimator's with seed s = 0 .. S-1, each over all the router's parameters
    as one vector. If |g*| is 0 all four are NaN.
    """

    name: str
    """The registered name, or an instance's class and settings."""
    normalize: str
    """How its weights were normalised: as in the layer, or its own choice if it must differ."""
    cosine: float
    """mean over s of <g_s, g*> / (|g_s| |g*|): 1 = the same direction, 0 = unrelated.

    A g_s of length 0 has no direction and counts as 0.
    """
    norm_ratio: float
    """mean over s of |g_s| / |g*|: 1 = the same length. A learning rate can compensate for it."""
    bias: float
    """|mean over s of g_s - g*| / |g*|: the error that remains when many steps are averaged.

    For an estimator that samples it also includes what S draws do not average out: about
    deviation / sqrt(S).
    """
    deviation: float
    """sqrt(sum over s of |g_s - mean of g|^2 / (S - 1)) / |g*|: the error that averages out.

    0 without sampling, NaN for one seed.
    """
    seconds: float
    """Forward and backward of the first batch, for the input and all the layer's parameters: the
    fastest of ten rounds in which the estimators take turns."""
    peak_bytes: int
    """The peak memory of such a step in excess of what was allocated before, as torch's
    allocator counts it: activations, temporary tensors and the gradients."""


@dataclass(frozen=True)
class EstimatorComparison:
    """The measurements of all the estimators; str() gives a table."""

    results: tuple[EstimatorResult, ...]
    """One for each estimator, in the order given."""

    def __str__(self) -> str:
        """A table of plain text, a line for each estimator."""
        rows = [
            ("estimator", "normalize", "cosine", "norm ratio", "bias", "deviation", "ms", "MiB"),
            *(_cells(result) for result in self.results),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)

    def figure(self) -> Figure:
        """The table as a bar chart: a panel for each measure, a row for each estimator.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "EstimatorComparison: figure() must have matplotlib, got none installed; "
                "pip install 'torchmoe[train]' brings it"
            ) from error
        results = self.results
        figure = Figure(figsize=(13, 1.3 + 0.42 * len(results)), dpi=150, layout="constrained")
        panels = figure.subplots(1, 5, sharey=True)
        _draw_bars(panels[0], "cosine\ndense mixture: 1", [r.cosine for r in results], line=1.0)
        _draw_bars(
            panels[1], "norm ratio\ndense mixture: 1", [r.norm_ratio for r in results], line=1.0
        )
        _draw_errors(panels[2], results)
        relative = [r.seconds / results[0].seconds for r in results]
        _draw_bars(panels[3], "time\nthe first: 1", relative, line=1.0)
        _draw_bars(panels[4], "peak memory\nMiB", [r.peak_bytes / _MIB for r in results])
        panels[0].set_yticks(range(len(results)), [f"{r.name}\n{r.normalize}" for r in results])
        panels[0].invert_yaxis()
        return figure


def compare_estimators(
    moe: MoE,
    batches: Iterable[Any],
    loss: Callable[[Tensor, Any], Tensor],
    *,
    estimators: Sequence[str | Estimator] | None = None,
    seeds: int = 5,
    warm_up: int = 50,
) -> EstimatorComparison:
    """Compares the estimators' router gradients with the dense mixture's, for one layer.

    The dense mixture computes all the experts, so its gradient needs no estimate:

        y = sum over i of p_i E_i(x),   p = score_function(logits),   i = 0 .. E-1

    Each estimator replaces the layer's own, with the layer's score function and, if the estimator
    is defined for it, the layer's normalisation. All of them get the same parameters, batches and
    random draws. Only loss(hidden_states, batch) is differentiated: auxiliary losses are left out.
    The estimators run in training mode, the dense mixture in evaluation mode, so that noise in the
    router counts as the estimators' deviation. The layer itself, its state, its gradients and the
    state of torch's generators are not changed.

    What this does not measure: training succeeds or fails over thousands of steps, and a gradient
    close to the dense mixture's does not by itself mean better training. The layer computes K
    experts, not E; the right gradient for what it computes may be another one.

    Args:
        moe: the layer, at the stage of training to be compared; its router must not need
            router_input, which a batch does not have.
        batches: each is x [..., H], or a tuple or list whose first entry is x.
        loss: called as loss(hidden_states [..., H], batch), returns a scalar.
        estimators: registered names, or instances, which are copied. None is every registered one
            that is defined for the layer's score function and compatible with its router and
            experts.
        seeds: S, the number of draws for each batch.
        warm_up: the number of updates that an estimator with state gets before it is measured, over
            the batches in turn.

    Returns:
        A result for each estimator.

    Raises:
        TypeError: an argument has another type, moe is sharded, or a batch or loss is not a tensor.
        ValueError: there are no batches or no estimators, seeds is below 1, a name is unknown, an
            estimator is not defined for the layer, the loss is not a scalar or does not depend on
            the hidden states, or no parameter of the router requires a gradient.
    """
    if not isinstance(moe, MoE):
        raise TypeError(f"compare_estimators: moe must be a MoE, got {shown(moe)}")
    refuse_sharded("compare_estimators", "moe", moe)
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise TypeError(f"compare_estimators: batches must be iterable, got {shown(batches)}")
    check_callable("compare_estimators", "loss", loss)
    if estimators is not None and (
        not isinstance(estimators, Sequence) or isinstance(estimators, str)
    ):
        raise TypeError(
            "compare_estimators: estimators must be a sequence of names or Estimators, or None, "
            f"got {shown(estimators)}"
        )
    check_at_least("compare_estimators", "seeds", seeds, 1)
    check_at_least("compare_estimators", "warm_up", warm_up, 0)
    with same_draws(0, list(moe.parameters())), torch.enable_grad():
        bench = _Bench(moe, batches, loss)
        names = _defined_names(moe) if estimators is None else estimators
        if not names:
            raise ValueError("compare_estimators: estimators must hold at least one, got none")
        candidates = [_bound(moe, name) for name in names]
        for candidate in candidates:
            bench.warm_up(candidate, warm_up, seed=seeds)
        errors = bench.errors(candidates, seeds)
        seconds = bench.seconds(candidates)
        return EstimatorComparison(
            tuple(
                EstimatorResult(
                    _label(name),
                    candidate.normalize,
                    *errors[i],
                    seconds=seconds[i],
                    peak_bytes=bench.peak_bytes(candidate),
                )
                for i, (name, candidate) in enumerate(zip(names, candidates, strict=True))
            )
        )


class _Bench:
    """A copy of the layer whose estimator is exchanged, the batches and the loss."""

    def __init__(
        self, moe: MoE, batches: Iterable[Any], loss: Callable[[Tensor, Any], Tensor]
    ) -> None:
        self._layer = untrained_copy(moe)
        self._own_estimator = self._layer.estimator
        self._batches = list(batches)
        self._loss = loss
        if not self._batches:
            raise ValueError("compare_estimators: batches must hold at least one, got none")
        parameters = list(self._layer.router.parameters())
        self._router_parameters = [p for p in parameters if p.requires_grad]
        if not self._router_parameters:
            raise ValueError(
                "compare_estimators: moe.router must have a parameter that requires a gradient, "
                f"got {len(parameters)} without"
            )
        self._device = parameters[0].device

    def warm_up(self, estimator: Estimator, updates: int, seed: int) -> None:
        """Moves the estimator's state; not the router's, which all estimators are to share."""
        if next(estimator.buffers(), None) is None:
            return
        with torch.no_grad(), same_draws(seed, self._router_parameters):
            for i in range(updates):
                x = _input(self._batches[i % len(self._batches)])
                estimator.update(self._train(estimator)(x).routing.statistics)

    def errors(
        self, estimators: Sequence[Estimator], seeds: int
    ) -> list[tuple[float, float, float, float]]:
        """Of each estimator: cosine, norm ratio, bias and deviation, means over the batches."""
        sums = torch.zeros(len(estimators), 4, dtype=torch.float64)
        for batch in self._batches:
            dense = self._router_gradient(self._dense_output(_input(batch)), batch)
            for i, estimator in enumerate(estimators):
                drawn = [self._drawn_gradient(estimator, batch, seed) for seed in range(seeds)]
                sums[i] += _errors(torch.stack(drawn), dense)
        rows = (sums / len(self._batches)).tolist()
        return [(cosine, ratio, bias, deviation) for cosine, ratio, bias, deviation in rows]

    def seconds(self, estimators: Sequence[Estimator]) -> list[float]:
        """The time of each estimator's step."""
        fastest = [float("inf")] * len(estimators)
        for _ in range(_ROUNDS):
            for i, estimator in enumerate(estimators):
                self._synchronize()
                start = time.perf_counter()
                self._step(estimator)
                self._synchronize()
                fastest[i] = min(fastest[i], time.perf_counter() - start)
        return fastest

    def peak_bytes(self, estimator: Estimator) -> int:
        """The memory of the estimator's step."""
        return peak_bytes(lambda: self._step(estimator), self._device)

    def _train(self, estimator: Estimator) -> MoE:
        self._layer.estimator = estimator
        return self._layer.train()

    def _dense_output(self, x: Tensor) -> Tensor:
        layer = self._layer.eval()
        tokens = x.reshape(-1, layer.hidden_size)
        logits = route(layer.router, x, layer.num_experts).logits  # [T, E]
        everyone = torch.arange(layer.num_experts, device=x.device).expand(logits.shape)
        probs = self._own_estimator.probs(logits)
        return layer.experts(tokens, everyone, probs).reshape(x.shape)

    def _drawn_gradient(self, estimator: Estimator, batch: object, seed: int) -> Tensor:
        with same_draws(seed, self._router_parameters):
            hidden_states = self._train(estimator)(_input(batch)).hidden_states
            return self._router_gradient(hidden_states, batch)

    def _router_gradient(self, hidden_states: Tensor, batch: object) -> Tensor:
        value = self._value(hidden_states, batch)
        gradients = torch.autograd.grad(
            value, self._router_parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten().double() for gradient in gradients])

    def _value(self, hidden_states: Tensor, batch: object) -> Tensor:
        value = self._loss(hidden_states, batch)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"compare_estimators: loss must return a tensor, got {type(value).__name__}"
            )
        if value.dim() != 0:
            raise ValueError(
                f"compare_estimators: loss must return a scalar, got shape {list(value.shape)}"
            )
        if not value.requires_grad:
            raise ValueError(
                "compare_estimators: loss must depend on hidden_states, got a value without a "
                "gradient"
            )
        return value

    def _step(self, estimator: Estimator) -> None:
        """Forward and backward of the first batch, as in training."""
        batch = self._batches[0]
        x = _input(batch).detach().requires_grad_()
        value = self._value(self._train(estimator)(x).hidden_states, batch)
        wanted = [x, *(p for p in self._layer.parameters() if p.requires_grad)]
        torch.autograd.grad(value, wanted, allow_unused=True)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _input(batch: object) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            "compare_estimators: batches must hold tensors, or tuples that start with one, "
            f"got {type(x).__name__}"
        )
    return x


def _defined_names(moe: MoE) -> tuple[str, ...]:
    return tuple(name for name in known_estimators() if _goes_with(moe, name))


def _goes_with(moe: MoE, name: str) -> bool:
    try:
        _bound(moe, name)
    except ValueError:
        return False
    return True


def _bound(moe: MoE, name: str | Estimator) -> Estimator:
    """A new estimator, or a copy of an instance, that belongs to the layer."""
    estimator = copy.deepcopy(build_estimator(name))
    layer = dict(moe.estimator._layer or {})
    if layer["normalize"] not in estimator.normalizes:
        layer["normalize"] = None
    # One that belongs to such a layer already keeps the state it has learnt there.
    if estimator._layer != layer:
        parameter = next(moe.router.parameters())
        estimator.bind(**layer, device=parameter.device, dtype=parameter.dtype)
    check_pairs(replace(Parts.of(moe, moe.balance, moe.capacity, moe.cache), estimator=estimator))
    return estimator


def _label(name: str | Estimator) -> str:
    if isinstance(name, str):
        return name
    settings = name.extra_repr()
    return f"{type(name).__name__}({settings})" if settings else type(name).__name__


def _errors(drawn: Tensor, dense: Tensor) -> Tensor:
    """Cosine, norm ratio, bias and deviation [4] of gradients drawn [S, P] from dense [P]."""
    length = dense.norm()
    length = torch.where(length > 0, length, torch.nan)
    lengths = drawn.norm(dim=1)  # [S]
    cosines = torch.where(lengths > 0, drawn @ dense / (lengths * length), 0 * length)
    mean = drawn.mean(dim=0)  # [P]
    variance = (drawn - mean).square().sum() / (drawn.shape[0] - 1)  # 0 / 0 for one seed
    return torch.stack(
        [
            cosines.mean(),
            (lengths / length).mean(),
            (mean - dense).norm() / length,
            variance.sqrt() / length,
        ]
    ).cpu()


def _cells(result: EstimatorResult) -> tuple[str, ...]:
    errors = (result.cosine, result.norm_ratio, result.bias, result.deviation)
    return (
        result.name,
        result.normalize,
        *(f"{value:.3f}" for value in errors),
        f"{1e3 * result.seconds:.2f}",
        f"{result.peak_bytes / _MIB:.2f}",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Texts to the left, numbers to the right."""
    cells = zip(row, widths, strict=True)
    return "  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells)
    )


def _draw_bars(axes: Axes, title: str, values: Sequence[float], line: float | None = None) -> None:
    _add_bars(axes, range(len(values)), values, height=0.6, color=_BLUE)
    if line is not None:
        axes.axvline(line, color="0.4", linewidth=1, linestyle="--")
    _finish(axes, title)


def _draw_errors(axes: Axes, results: Sequence[EstimatorResult]) -> None:
    """Bias above deviation."""
    for label, colour, offset in (("bias", _BLUE, -0.2), ("deviation", _ORANGE, 0.2)):
        places = [i + offset for i in range(len(results))]
        values = [getattr(result, label) for result in results]
        _add_bars(axes, places, values, height=0.36, color=colour, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8, frameon=False)
    _finish(axes, "bias and deviation\nper length of the dense one")


def _add_bars(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float],
    **look: Any,  # noqa: ANN401 (matplotlib's own)
) -> None:
    bars = axes.barh(places, values, **look)
    # On white, so that a dashed line does not cross a number.
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, bbox=ground)


def _finish(axes: Axes, title: str) -> None:
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.margins(x=0.25)  # room for the numbers
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that torch's allocator holds for run() at one time.

    On the CPU what a kernel allocates on another thread than its caller's is not seen.
    """
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    # Kineto, the other profiler, writes a line to stderr whenever it starts or stops.
    config = ProfilerConfig(
        ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=True,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=_ExperimentalConfig(),
    )
    _enable_profiler_legacy(config)
    try:
        run()
    finally:
        events = _disable_profiler_legacy()  # one list for each thread
    # An allocation counts its bytes, a release the same below 0, and what is neither counts 0.
    return max(accumulate((e.cpu_memory_usage() for e in chain(*events)), initial=0))
