"""check_surrogate and gradcheck find every planted error, and nothing where there is none."""

from __future__ import annotations

import random
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
from torchmoe.testing import check_surrogate

#: Those whose settings are drawn; any other is tried with its defaults.
DRAWN = (
    Exact,
    StraightThrough,
    StraightThroughDense,
    DefaultVector,
    SparseMixer,
    GumbelStraightThrough,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_built_in_estimators_are_right(name: str) -> None:
    assert check_surrogate(name)
    assert check_surrogate(name, capacity=Capacity(0.6), masked_tokens=2, bias=True, seed=1)
    assert check_surrogate(name, training=False, fast_mode=True)


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
        "estimator": estimator,
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


def test_the_message_names_what_is_compared() -> None:
    with pytest.raises(GradcheckError) as error:
        check_surrogate(scaled(StraightThrough, 2.0)())
    text = str(error.value)
    assert "numerical: the declared surrogate; analytical: the layer with the estimator" in text
    assert "0 = x, 1 = router.weight, 2 = experts.gate_up_proj, 3 = experts.down_proj" in text


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
