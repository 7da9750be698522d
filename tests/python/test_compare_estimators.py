"""compare_estimators measures gradients that are known, and leaves what it is given alone."""

from __future__ import annotations

import copy
import math
import re
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from built_in import ESTIMATORS
from torchmoe.nn import (
    Balance,
    Capacity,
    Estimator,
    ExpertCommunication,
    ExpertList,
    Experts,
    Gate,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
    known_estimators,
)
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.testing import EstimatorComparison, EstimatorResult, compare_estimators
from torchmoe.testing._compare_estimators import peak_bytes

H, INNER, E, T = 4, 3, 4, 6


UNNORMALISED = Gate(normalize="none")


def make_moe(top_k: int = E, gate: Gate = UNNORMALISED, **options: Any) -> MoE:
    return MoE(H, INNER, E, top_k, gate=gate, dtype=torch.float64, **options)


def make_batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(2, T // 2, H, dtype=torch.float64) for _ in range(count)]


def square(hidden_states: Tensor, batch: object) -> Tensor:
    return (hidden_states - 1).square().sum()


class Scaled(Estimator):
    """The exact weights, whose gradient is multiplied by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        weights = super().weigh(logits, indices)
        return weights.detach() + self.factor * (weights - weights.detach())


class RandomlyScaled(Scaled):
    """One whose factor is drawn."""

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        self.factor = torch.randn((), dtype=torch.float64).item()
        return super().weigh(logits, indices)


class Unnormalised(Estimator):
    normalizes = ("none",)
    refusal = "as it says"


class Log(list[tuple[int, float]]):
    """A list whose copies are itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Log:
        return self


class Counting(Estimator):
    """Counts its updates, adds up what they were given, and notes both when it is measured."""

    updates: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.measured = Log()

    def bind(self, **layer: Any) -> None:
        super().bind(**layer)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.measured.append((int(self.updates), float(self.total)))
        return super().weigh(logits, indices)

    def combine(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().combine(x, *args, **kwargs), x.detach().sum()

    def update(self, statistics: Tensor) -> None:
        self.updates += 1
        self.total += statistics


def errors(result: EstimatorResult) -> tuple[float, float, float, float]:
    return result.cosine, result.norm_ratio, result.bias, result.deviation


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_all_experts_need_no_estimate(score_function: str) -> None:
    moe = make_moe(gate=Gate(score_function, "none"), router=Router(H, E, bias=True).double())
    comparison = compare_estimators(
        moe, make_batches(), square, estimators=["exact", Scaled(2.0), Scaled(-0.5), Scaled(0.0)]
    )
    found = [errors(result) for result in comparison.results]
    expected = [(1, 1, 0, 0), (1, 2, 1, 0), (-1, 0.5, 1.5, 0), (0, 0, 1, 0)]
    assert found == [pytest.approx(row, abs=1e-12) for row in expected]
    assert [result.name for result in comparison.results] == ["exact", *3 * ["Scaled"]]


def test_random_gradients_are_measured_as_they_are_drawn() -> None:
    factors = []
    for seed in range(4):
        torch.manual_seed(seed)
        factors.append(torch.randn((), dtype=torch.float64))
    drawn = torch.stack(factors)
    comparison = compare_estimators(
        make_moe(), make_batches(), square, estimators=[RandomlyScaled(0.0)], seeds=4
    )
    expected = drawn.sign().mean(), drawn.abs().mean(), (drawn.mean() - 1).abs(), drawn.std()
    assert errors(comparison.results[0]) == pytest.approx(torch.stack(expected).tolist())


def test_the_reference_is_the_dense_mixture_of_plain_autograd() -> None:
    moe = make_moe(top_k=2)
    batch = make_batches(1)[0]
    x = batch.reshape(-1, H)

    one_each = [torch.full((len(x), 1), i) for i in range(E)]
    outputs = torch.stack([moe.experts(x, ids, torch.ones(len(x), 1)) for ids in one_each], dim=1)
    probs = (x @ moe.router.weight.T).softmax(dim=-1)
    dense = (outputs * probs.unsqueeze(-1)).sum(dim=1)
    chosen = probs * torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1)
    sparse = (outputs * chosen.unsqueeze(-1)).sum(dim=1)
    wanted, given = (
        torch.autograd.grad(square(y, batch), moe.router.weight, retain_graph=True)[0].flatten()
        for y in (dense, sparse)
    )

    result = compare_estimators(moe, [batch], square, estimators=["exact"]).results[0]
    assert result.cosine == pytest.approx(torch.cosine_similarity(given, wanted, dim=0).item())
    assert result.norm_ratio == pytest.approx((given.norm() / wanted.norm()).item())
    assert result.bias == pytest.approx(((given - wanted).norm() / wanted.norm()).item())


def test_numbers_are_means_over_the_batches() -> None:
    moe, batches = make_moe(top_k=2), make_batches(3)
    together = compare_estimators(moe, batches, square, estimators=["exact"]).results[0]
    alone = [
        errors(compare_estimators(moe, [batch], square, estimators=["exact"]).results[0])
        for batch in batches
    ]
    assert len(set(alone)) == 3
    assert errors(together) == pytest.approx([sum(row) / 3 for row in zip(*alone, strict=True)])


def test_a_dense_gradient_is_closer_than_one_of_the_chosen_experts() -> None:
    experts = ExpertList([nn.Linear(H, H, dtype=torch.float64) for _ in range(E)])
    moe = make_moe(top_k=1, gate=Gate(), experts=experts)
    names = ["exact", "straight_through_dense"]
    exact, dense = compare_estimators(moe, make_batches(), square, estimators=names).results
    assert dense.cosine > exact.cosine


def test_every_registered_estimator_that_is_defined_for_the_layer() -> None:
    for score_function in ("softmax", "sigmoid"):
        experts = ExpertList([nn.Linear(H, H, dtype=torch.float64) for _ in range(E)])
        moe = make_moe(top_k=2, gate=Gate(score_function), experts=experts)
        comparison = compare_estimators(moe, make_batches(), square, seeds=2, warm_up=3)
        defined = [
            name
            for name in known_estimators()
            if score_function in build_estimator(name).score_functions
        ]
        assert [result.name for result in comparison.results] == defined
        for result in comparison.results:
            assert all(math.isfinite(value) for value in errors(result))
            assert result.seconds > 0
            assert result.peak_bytes > 0


def test_normalisation_is_the_layers_where_it_is_defined() -> None:
    moe = make_moe(top_k=2, gate=Gate(normalize="topk"))
    estimators = ["exact", Unnormalised()]
    exact, other = compare_estimators(moe, make_batches(), square, estimators=estimators).results
    assert (exact.normalize, other.normalize) == ("topk", "none")
    own_choice = make_moe(top_k=1, gate=Gate(normalize=None))
    result = compare_estimators(own_choice, make_batches(), square, estimators=["exact"]).results[0]
    assert result.normalize == "none"


def test_the_layer_is_left_as_it_is() -> None:
    moe = make_moe(
        top_k=2,
        gate=Gate(estimator=Counting()),
        capacity=Capacity(1.0),
        router=Router(H, E, input_jitter=0.1, logit_noise=0.5, usage_scaling=True).double(),
    ).eval()
    batches = [(x.requires_grad_(), torch.randn_like(x)) for x in make_batches()]
    head = nn.Linear(H, 1, dtype=torch.float64)

    def loss(hidden_states: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (head(hidden_states) * batch[1]).sum()

    loss(moe(batches[0][0]).hidden_states, batches[0]).backward()
    watched = [*moe.parameters(), *head.parameters(), batches[0][0]]
    gradients = [tensor.grad.clone() for tensor in watched]
    state = copy.deepcopy(moe.state_dict())
    estimator = moe.estimator
    draws = torch.get_rng_state()

    with torch.no_grad():
        compare_estimators(moe, batches, loss, estimators=["exact", estimator], warm_up=3)

    assert torch.equal(torch.get_rng_state(), draws)
    assert moe.estimator is estimator
    assert not any(module.training for module in moe.modules())
    assert all(torch.equal(a.grad, b) for a, b in zip(watched, gradients, strict=True))
    assert batches[1][0].grad is None
    assert moe.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in moe.state_dict().items())


def test_the_same_numbers_every_time() -> None:
    moe = make_moe(top_k=2, router=Router(H, E, logit_noise=0.5).double())
    batches = make_batches()
    names = ["exact", "gumbel_straight_through"]
    first, second = (compare_estimators(moe, batches, square, estimators=names) for _ in range(2))
    assert [errors(r) for r in first.results] == [errors(r) for r in second.results]
    reordered = compare_estimators(moe, batches, square, estimators=names[::-1])
    assert [errors(r) for r in reordered.results[::-1]] == [errors(r) for r in first.results]


def test_noise_of_the_router_counts_as_deviation() -> None:
    moe = make_moe(router=Router(H, E, logit_noise=0.5).double())
    result = compare_estimators(moe, make_batches(), square, estimators=["exact"]).results[0]
    assert result.deviation > 0.01
    assert result.bias < result.deviation


def test_an_estimator_with_state_is_warmed_up_over_the_batches_in_turn() -> None:
    moe, batches, counting = make_moe(top_k=2), make_batches(2), Counting()
    compare_estimators(moe, batches, square, estimators=[counting], seeds=1, warm_up=5)
    total = (3 * batches[0].sum() + 2 * batches[1].sum()).item()
    assert {count for count, _ in counting.measured} == {5}
    assert all(found == pytest.approx(total) for _, found in counting.measured)


def test_warming_up_leaves_the_routers_usage_alone() -> None:
    moe = make_moe(top_k=2, router=Router(H, E, usage_scaling=True).double())
    batches = make_batches(2)
    alone, beside = (
        compare_estimators(moe, batches, square, estimators=estimators).results[0]
        for estimators in (["exact"], ["exact", Counting()])
    )
    assert errors(alone) == errors(beside)


def test_a_bound_instance_keeps_its_state_and_an_unbound_one_stays_unbound() -> None:
    moe = make_moe(top_k=2, gate=Gate(estimator=Counting(), normalize="topk"))
    bound, unbound = moe.estimator, Counting()
    bound.update(torch.tensor(7.0))
    compare_estimators(moe, make_batches(), square, estimators=[bound, unbound], warm_up=2)
    assert {count for count, _ in bound.measured} == {3}
    assert (bound.updates, bound.total) == (1, 7.0)
    assert {count for count, _ in unbound.measured} == {2}
    assert not list(unbound.buffers())
    with pytest.raises(ValueError, match="must be an instance of its own"):
        compare_estimators(make_moe(top_k=3), make_batches(), square, estimators=[bound])


def test_no_dense_gradient_and_a_single_seed_give_nan() -> None:
    moe, batches = make_moe(top_k=2), make_batches()
    nothing = compare_estimators(moe, batches, lambda y, _: 0 * y.sum(), estimators=["exact"])
    assert all(math.isnan(value) for value in errors(nothing.results[0]))
    single = compare_estimators(moe, batches, square, estimators=["exact"], seeds=1).results[0]
    assert math.isnan(single.deviation)
    assert all(math.isfinite(value) for value in errors(single)[:3])


def test_time_is_that_of_forward_and_backward() -> None:
    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            time.sleep(0.01)
            return grad

    class Slow(Estimator):
        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return super().weigh(Pause.apply(logits), indices)

    result = compare_estimators(make_moe(), make_batches(1), square, estimators=[Slow()], seeds=1)
    assert 0.02 <= result.results[0].seconds < 1


def test_peak_memory_of_a_known_case() -> None:
    kept = []

    def run() -> None:
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(2000, dtype=torch.float64)
        del first
        kept.append(torch.empty(500, dtype=torch.float64))
        del second
        kept.append(torch.zeros(100, dtype=torch.float64) + 1)

    assert peak_bytes(run, torch.device("cpu")) == 8 * 3000


def test_peak_memory_of_an_estimator() -> None:
    size = 2**23

    class Hungry(Estimator):
        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            torch.empty(size, dtype=torch.uint8)
            return super().weigh(logits, indices)

    estimators = ["exact", Hungry()]
    exact, hungry = compare_estimators(
        make_moe(), make_batches(1), square, estimators=estimators, seeds=1
    ).results
    parameters = sum(8 * parameter.numel() for parameter in make_moe().parameters())
    assert parameters < exact.peak_bytes < 2**16
    assert size < hungry.peak_bytes < size + exact.peak_bytes


RESULTS = (
    EstimatorResult("exact", "topk", 0.8671, 1.0414, 0.5284, 1e-17, 0.0025, 2**21),
    EstimatorResult("Scaled(factor=2)", "none", -0.3, 12.0, 0.36, math.nan, 0.11, 2**30),
)


def test_table() -> None:
    assert str(EstimatorComparison(RESULTS)).split("\n") == [
        "estimator         normalize  cosine  norm ratio   bias  deviation      ms      MiB",
        "exact             topk        0.867       1.041  0.528      0.000    2.50     2.00",
        "Scaled(factor=2)  none       -0.300      12.000  0.360        nan  110.00  1024.00",
    ]


def test_figure() -> None:
    figure = EstimatorComparison(RESULTS).figure()
    figure.draw_without_rendering()
    panels = figure.axes
    assert [panel.get_title().split("\n")[0] for panel in panels] == [
        "cosine",
        "norm ratio",
        "bias and deviation",
        "time",
        "peak memory",
    ]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["exact\ntopk", "Scaled(factor=2)\nnone"]
    assert [bar.get_width() for bar in panels[3].patches] == pytest.approx([1.0, 44.0])
    assert [bar.get_width() for bar in panels[4].patches] == [2.0, 1024.0]
    top, bottom = (panels[0].transData.transform((0, y))[1] for y in (0, 1))
    assert top > bottom  # the first on top


def test_figure_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torchmoe\[train\]'"):
        EstimatorComparison(RESULTS).figure()


def test_settings_of_an_instance_are_in_its_name() -> None:
    class Tempered(Estimator):
        def extra_repr(self) -> str:
            return "temperature=0.5"

    result = compare_estimators(make_moe(), make_batches(), square, estimators=[Tempered()])
    assert result.results[0].name == "Tempered(temperature=0.5)"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"moe": nn.Linear(H, H)}, TypeError, "moe must be a MoE, got Linear"),
        ({"batches": []}, ValueError, "batches must hold at least one, got none"),
        ({"batches": [{"x": 1}]}, TypeError, "batches must hold tensors, .* got dict"),
        ({"batches": [()]}, TypeError, "batches must hold tensors, .* got tuple"),
        ({"estimators": []}, ValueError, "estimators must hold at least one, got none"),
        ({"estimators": ["excat"]}, ValueError, 'estimator must be one of .* got "excat"'),
        ({"seeds": 0}, ValueError, "seeds must be >= 1, got 0"),
        ({"warm_up": -1}, ValueError, "warm_up must be >= 0, got -1"),
        ({"loss": lambda y, _: y}, ValueError, r"loss must return a scalar, got shape \[2, 3, 4\]"),
        ({"loss": lambda y, _: 1.0}, TypeError, "loss must return a tensor, got float"),
        ({"loss": lambda y, _: y.detach().sum()}, ValueError, "loss must depend on hidden_states"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"moe": make_moe(), "batches": make_batches(), "loss": square, **changed}
    prefix = "" if "one of" in message else "compare_estimators: "
    with pytest.raises(error, match=prefix + message):
        compare_estimators(**arguments)


def test_a_frozen_router_has_nothing_to_compare() -> None:
    moe = make_moe()
    moe.router.requires_grad_(False)
    expected = "moe.router must have a parameter that requires a gradient, got 1 without"
    with pytest.raises(ValueError, match=re.escape(expected)):
        compare_estimators(moe, make_batches(), square)
    moe = MoE(H, INNER, E, 2, router=HashRouter(E, 2))
    with pytest.raises(ValueError, match=r"moe\.router must have .*, got 0 without"):
        compare_estimators(moe, make_batches(), square)


def test_an_estimator_that_is_not_defined_for_the_layer() -> None:
    moe = make_moe(top_k=2, gate=Gate("sigmoid"))
    with pytest.raises(ValueError, match=r'score_function must be "softmax" .*got "sigmoid"'):
        compare_estimators(moe, make_batches(), square, estimators=["sparsemixer"])


def test_leaves_out_what_does_not_go_with_the_router_or_the_experts() -> None:
    router = SequenceRouter(Router(H, E, dtype=torch.float64))
    talking = ExpertCommunication(
        Experts(H, INNER, E, dtype=torch.float64), H, E, dtype=torch.float64
    )
    drawing = {name for name, kind in ESTIMATORS.items() if kind.draws}
    alone = {name for name, kind in ESTIMATORS.items() if kind.takes_experts_alone}
    unbiased = {name for name, kind in ESTIMATORS.items() if not kind.takes_selection_bias}
    assert drawing >= {"sparsemixer", "gumbel_straight_through"}
    assert alone >= {"default_vector", "straight_through_dense"}
    assert unbiased >= {"sparsemixer"}
    for options, left_out in (
        ({"router": router}, drawing),
        ({"balance": Balance(selection_bias_rate=0.1)}, unbiased),
        ({"experts": talking}, alone),
    ):
        moe = make_moe(top_k=2, gate=Gate(), **options)
        compared = compare_estimators(moe, make_batches(1), square, seeds=1, warm_up=0)
        assert {one.name for one in compared.results} == {*known_estimators()} - left_out
        for name in left_out:
            with pytest.raises(ValueError, match=r"MoE: (gate.estimator must not|balance.sel)"):
                compare_estimators(moe, make_batches(1), square, estimators=[name])
