"""check_surrogate and gradcheck find every planted error, and nothing where there is none."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from built_in import ESTIMATORS
from planted_errors import (
    PLANTED,
    scaled,
)
from torchmoe.nn import (
    Capacity,
    DefaultVector,
    Exact,
    ExpertList,
    GumbelStraightThrough,
    SparseMixer,
    StraightThrough,
    StraightThroughDense,
)
from torchmoe.testing import UnstableSelectionError, check_surrogate

#: Those whose settings are drawn; any other is tried with its defaults.
DRAWN = (
    Exact,
    StraightThrough,
    StraightThroughDense,
    DefaultVector,
    SparseMixer,
    GumbelStraightThrough,
)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_built_in_estimators_are_right(name: str) -> None:
    assert check_surrogate(name)
    assert check_surrogate(name, capacity=Capacity(0.6), masked_tokens=2, bias=True, seed=1)
    assert check_surrogate(name, training=False, fast_mode=True)


def test_shared_experts_and_a_factor_are_part_of_the_formula() -> None:
    shared = torch.nn.Linear(4, 4, dtype=torch.float64)
    layer = {"shared_experts": shared, "routed_scaling_factor": 2.5, "masked_tokens": 2}
    assert check_surrogate("straight_through", **layer)
    wrong = scaled(StraightThrough, 2.0)()
    assert not check_surrogate(wrong, **layer, raise_exception=False)


def test_it_leaves_what_it_is_given_alone() -> None:
    estimator = DefaultVector()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert check_surrogate(estimator)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert repr(estimator) == "DefaultVector(decay=0.99)"
    assert not list(estimator.buffers())


# --- 1,000 right configurations -----------------------------------------------------------------


def draw(seed: int) -> dict[str, Any]:
    """Any estimator on any small layer on which it is defined."""
    choose = random.Random(seed)
    num_experts = choose.randint(1, 6)
    estimator = choose.choice(
        [
            Exact(),
            StraightThrough(),
            StraightThroughDense(),
            DefaultVector(choose.random() * 0.99),
            SparseMixer(choose.choice([0.01, 0.2, 1.0, 10.0])),
            GumbelStraightThrough(choose.choice([0.0, 0.3, 1.0, 4.0])),
            *(kind() for kind in ESTIMATORS.values() if kind not in DRAWN),
        ]
    )
    top_k = choose.randint(1, num_experts)
    normalizes = [None, *estimator.normalizes]
    if estimator.gate_estimator == "exact":
        # Elsewhere the exact gradient is zero, and refused.
        normalizes = [n for n in normalizes if n != "uniform" and not (n == "topk" and top_k == 1)]
    num_tokens = choose.randint(1, 6)
    capacity = None
    if choose.random() < 0.5:
        normalize = choose.choice(["before_drop", "after_drop"])
        order = choose.choice(["choice", "token"])
        capacity = Capacity(choose.choice([0, 0.5, 0.8, 1.5]), normalize=normalize, order=order)
    return {
        "subject": estimator,
        "num_experts": num_experts,
        "top_k": top_k,
        "num_tokens": num_tokens,
        "hidden_size": choose.randint(1, 5),
        "intermediate_size": choose.randint(1, 4),
        "score_function": choose.choice(estimator.score_functions),
        "normalize": choose.choice(normalizes),
        "masked_tokens": choose.choice([0, 0, 1, num_tokens]),
        "training": choose.random() < 0.7,
        "capacity": capacity,
        "activation": choose.choice(["swiglu", "geglu", "gelu", "silu"]),
        "bias": choose.random() < 0.5,
        "seed": seed,
    }


@pytest.mark.parametrize("block", range(10))
def test_no_false_alarm_in_a_thousand_right_configurations(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        configuration = draw(seed)
        assert check_surrogate(**configuration, fast_mode=True), configuration


# --- planted errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name: str) -> None:
    make, options = PLANTED[name]
    with pytest.raises(GradcheckError):
        check_surrogate(make(), fast_mode=True, **options)


def test_without_exceptions() -> None:
    wrong = scaled(StraightThrough, 2.0)()
    assert not check_surrogate(wrong, fast_mode=True, raise_exception=False)
    assert not check_surrogate(scaled(Exact, 2.0)(), fast_mode=True, raise_exception=False)


# --- messages -----------------------------------------------------------------------------------


def test_a_wrong_estimator_is_one_screen() -> None:
    with pytest.raises(GradcheckError) as error:
        check_surrogate(scaled(StraightThrough, 2.0)())
    text = str(error.value)
    assert "inputs[0], router.weight must be the derivative of" in text.splitlines()[0]
    assert re.search(r"router\.weight +\[\d, \d\] ", text)
    assert "got is 2 times expected all over" in text
    assert len(text.splitlines()) < 15
    assert error.value.__suppress_context__  # torch's matrices


def test_another_output_is_an_error_too() -> None:
    class Doubled(StraightThrough):
        def combine(self, *arguments: Any, **options: Any) -> Any:
            return 2 * super().combine(*arguments, **options)

    with pytest.raises(
        GradcheckError, match=r"check_surrogate: the layer's output must be the sum"
    ):
        check_surrogate(Doubled())


def test_experts_of_ones_own() -> None:
    experts = ExpertList(torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(5))
    for name in ESTIMATORS:
        assert check_surrogate(name, experts=experts, intermediate_size=None, fast_mode=True)


def test_an_estimator_of_ones_own_with_parameters() -> None:
    class Temperature(StraightThrough):
        """A learned temperature, with the gradient of the scores at it."""

        def __init__(self) -> None:
            super().__init__()
            self.log_temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return super().weigh(logits / self.log_temperature.exp(), indices)

        def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
            return super().surrogate(logits / self.log_temperature.exp(), selected, indices)

    class Forgotten(Temperature):
        def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
            return StraightThrough.weigh(
                self, logits / self.log_temperature.exp().detach(), indices
            )

    assert check_surrogate(Temperature())
    with pytest.raises(GradcheckError):
        check_surrogate(Forgotten())


# --- custom functions, routers and layers --------------------------------------------------------


def straight_through(logits: Tensor) -> Tensor:
    """The best expert alone, with the gradient of all scores."""
    scores = logits.softmax(-1)
    hard = torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
    return hard + scores - scores.detach()


def scores_of(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def test_a_function_against_its_surrogate() -> None:
    logits = torch.randn(7, 5)
    assert check_surrogate(straight_through, logits, surrogate=scores_of)
    with pytest.raises(GradcheckError) as error:
        check_surrogate(straight_through, logits, surrogate=torch.sigmoid)
    text = str(error.value)
    assert text.startswith("check_surrogate: the gradient of inputs[0] must be the derivative of")
    assert len(text.splitlines()) < 15
    assert not check_surrogate(
        straight_through, logits, surrogate=lambda z: 2 * z.softmax(-1), raise_exception=False
    )


def test_a_gradient_that_never_flows_is_another_one() -> None:
    with pytest.raises(GradcheckError, match=r"no gradient arrives at inputs\[0\]"):
        check_surrogate(
            lambda logits: straight_through(logits).detach(),
            torch.randn(7, 5),
            surrogate=scores_of,
        )


class HardRouter(torch.nn.Module):
    """Logits of 0 and 1 from a linear map, with the gradient of its sigmoid."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 4))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        soft = self.factor * self.surrogate(x)
        return (soft > self.factor / 2).to(soft.dtype) + soft - soft.detach()

    def surrogate(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).sigmoid()


def test_a_router_against_its_own_method() -> None:
    assert check_surrogate(HardRouter(), torch.randn(7, 4))
    with pytest.raises(GradcheckError, match=r"got is 0\.5 times expected all over"):
        check_surrogate(HardRouter(0.5), torch.randn(7, 4))


class OneExpert(torch.nn.Module):
    """The best expert's output, whose weight of 1 has the gradient of its score."""

    def __init__(self, missing: bool = False) -> None:
        super().__init__()
        self.router = torch.nn.Linear(4, 3)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.missing = missing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        p, ids = logits.softmax(-1).max(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs.take_along_dim(ids.unsqueeze(-1), dim=1).squeeze(1)
        weight = torch.ones_like(p) if self.missing else 1 + p - p.detach()
        return weight * chosen, logits

    def surrogate(self, x: Tensor) -> Tensor:
        p, ids = self.router(x).softmax(-1).max(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs.take_along_dim(ids.unsqueeze(-1), dim=1).squeeze(1)
        return chosen + (p - p.detach()) * chosen.detach()


def test_what_a_surrogate_detaches_is_held_constant() -> None:
    x = torch.randn(9, 4)
    assert check_surrogate(OneExpert(), x)
    assert check_surrogate(OneExpert(), x, surrogate=OneExpert.surrogate)
    with pytest.raises(GradcheckError, match=r"of inputs\[0\], router\.weight, router\.bias must"):
        check_surrogate(OneExpert(missing=True), x)


def test_a_surrogate_with_another_gradient_than_its_own_derivative() -> None:
    def without_grad(logits: Tensor) -> Tensor:
        with torch.no_grad():
            total = logits.exp().sum(-1, keepdim=True)
        return logits.exp() / total

    with pytest.raises(GradcheckError, match=r"surrogate itself: .* marked by \.detach\(\)"):
        check_surrogate(straight_through, torch.randn(7, 5), surrogate=without_grad)


def test_a_wrong_signature_says_the_right_one() -> None:
    x = torch.randn(7, 4)
    right = r"must be called as surrogate\(logits\), like the function, got surrogate\(a, b\)"
    with pytest.raises(TypeError, match=right):
        check_surrogate(straight_through, x, surrogate=lambda a, b: a)
    right = r"must be called as surrogate\(module, x\), like the module, got surrogate\(x\)"
    with pytest.raises(TypeError, match=right):
        check_surrogate(HardRouter(), x, surrogate=lambda x: x)
    router = HardRouter()
    router.surrogate = lambda: x
    right = r"must be called as surrogate\(x\), like the module, got surrogate\(\)"
    with pytest.raises(TypeError, match=right):
        check_surrogate(router, x)
    with pytest.raises(TypeError, match=r"surrogate must be given for what has no method of that"):
        check_surrogate(torch.nn.Linear(4, 2), x)
    with pytest.raises(
        RuntimeError, match=r"surrogate must return .* \[\[7, 4\]\], got .* \[\[7\]\]"
    ):
        check_surrogate(straight_through, x, surrogate=lambda logits: logits.sum(1))


def test_an_estimators_wrong_signature_says_the_right_one() -> None:
    class Old(StraightThrough):
        def surrogate(self, logits: Tensor, indices: Tensor) -> Tensor:  # type: ignore[override]
            return super().surrogate(logits, indices, indices)

    right = r"surrogate must be called as surrogate\(logits, selected, indices\), got surrogate\(lo"
    with pytest.raises(TypeError, match=right):
        check_surrogate(Old())


def test_ties_say_how_to_avoid_them() -> None:
    def best(logits: Tensor) -> Tensor:
        return logits.softmax(-1).max(-1).values

    with pytest.raises(UnstableSelectionError, match=r"check at random inputs, and with a router"):
        check_surrogate(best, torch.zeros(7, 4), surrogate=best)
    router = torch.nn.Linear(4, 5, bias=False)
    torch.nn.init.zeros_(router.weight)
    with pytest.raises(UnstableSelectionError, match=r"not one that starts at zero"):
        check_surrogate("exact", router=router.double())


def test_arguments_of_the_other_kind() -> None:
    with pytest.raises(ValueError, match=r"num_tokens must be left out except for an estimator"):
        check_surrogate(straight_through, torch.randn(7, 4), surrogate=scores_of, num_tokens=3)
    with pytest.raises(
        ValueError, match=r"surrogate must be left out except for a module or function"
    ):
        check_surrogate("exact", surrogate=scores_of)
    with pytest.raises(TypeError, match=r"inputs must be given for a module or function, got None"):
        check_surrogate(straight_through, surrogate=scores_of)
