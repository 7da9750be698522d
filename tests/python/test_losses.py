"""The balancing terms of torchmoe.losses against loops in float64 from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from float_types import NARROW
from loss_formulas import (
    F32,
    F64,
    INF,
    NAN,
    E,
    K,
    T,
    global_entropy,
    importance,
    load,
    local_entropy,
    mutual_information,
)
from op_case import assert_close, tolerance
from torchmoe import losses

# --- every term through one door ----------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A loss as a function of one differentiable [T, C] tensor, its formula, and such a tensor."""

    name: str
    loss: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    options: dict[str, Any]
    from_weights: bool = False

    def draw(self, num_tokens: int = T, dtype: torch.dtype = F64) -> Tensor:
        if self.from_weights:
            return torch.rand(num_tokens, K, dtype=F64).to(dtype)
        return torch.randn(num_tokens, E, dtype=F64).to(dtype)

    def arguments(self, values: Tensor) -> dict[str, Any]:
        if not self.from_weights:
            return self.options
        generator = torch.Generator().manual_seed(4)
        ids = torch.rand(len(values), E, generator=generator).argsort(1)[:, :K].contiguous()
        ids[::5, 1] = -1
        ids[1::7, 0] = E + 3
        return {"indices": ids, "num_experts": E}

    def __call__(self, values: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.loss(values, **self.arguments(values), token_mask=token_mask)

    def expect(self, values: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.formula(values, **self.arguments(values), token_mask=token_mask)


TERMS = [
    Term("importance", losses.importance_loss, importance, {}, from_weights=True),
    *[Term(f"load-{k}", losses.load_loss, load, {"top_k": k}) for k in (1, 2, E - 1, E)],
    Term("load-wide", losses.load_loss, load, {"top_k": 2, "deviation": 1.5}),
    *[
        Term(f"{name}-{score_function}", loss, formula, {"score_function": score_function})
        for name, loss, formula in (
            ("local_entropy", losses.local_entropy_loss, local_entropy),
            ("global_entropy", losses.global_entropy_loss, global_entropy),
            ("mutual_information", losses.mutual_information_loss, mutual_information),
        )
        for score_function in ("softmax", "sigmoid")
    ],
]
NO_GRADIENT = f"load-{E}"  # of all experts: every P is 1


def name_of(term: Term) -> str:
    return term.name


ENTROPIES = [term for term in TERMS if "score_function" in term.options]
every_term = pytest.mark.parametrize("term", TERMS, ids=name_of)
every_entropy = pytest.mark.parametrize("term", ENTROPIES, ids=name_of)


def value_and_gradient(
    function: Callable[..., Tensor], values: Tensor, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = values.detach().clone().requires_grad_()
    result = function(leaf, token_mask)
    # NO_GRADIENT does not depend on the leaf.
    (gradient,) = torch.autograd.grad(
        result + 0 * torch.where(leaf.isfinite(), leaf, 0).sum(), [leaf]
    )
    return result.detach(), gradient


@every_term
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(term: Term, masked: bool) -> None:
    values = term.draw()
    mask = torch.rand(T) > 0.3 if masked else None
    result, gradient = value_and_gradient(term, values, mask)
    expected, expected_gradient = value_and_gradient(term.expect, values, mask)
    assert result.shape == ()
    assert result.dtype == F64
    assert_close(result, expected, tolerance(expected, n=T + E, wide=F64, stored=F64))
    atol = tolerance(expected_gradient, n=T + E, wide=F64, stored=F64)
    assert_close(gradient, expected_gradient, atol)
    if term.name != NO_GRADIENT:
        assert gradient.abs().max() > 100 * atol


@pytest.mark.parametrize("term", [t for t in TERMS if t.name != NO_GRADIENT], ids=name_of)
def test_gradcheck(term: Term) -> None:
    mask = torch.tensor([True, False, True, True])
    values = term.draw(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: term(v, mask), values)


def test_load_loss_is_differentiable_in_both_logits() -> None:
    logits, noisy = (torch.randn(4, E, dtype=F64, requires_grad=True) for _ in range(2))

    def both(logits: Tensor, noisy: Tensor) -> Tensor:
        return losses.load_loss(logits, K, noisy_logits=noisy, deviation=0.7)

    assert torch.autograd.gradcheck(both, (logits, noisy))
    expected = load(logits, K, noisy, 0.7)
    assert_close(both(logits, noisy), expected, tolerance(expected, n=T, wide=F64, stored=F64))
    one, other = torch.autograd.grad(both(logits, noisy), [logits, noisy])
    assert one.abs().max() > 1e-3
    assert other.abs().max() > 1e-3


@every_term
def test_what_a_masked_token_holds_does_not_matter(term: Term) -> None:
    values = term.draw()
    mask = torch.rand(T) > 0.4
    assert not mask.all()
    expected, expected_gradient = value_and_gradient(term, values, mask)
    for garbage in (NAN, INF, -INF, 1e30):
        spoilt = values.masked_fill(~mask.unsqueeze(1), garbage)
        result, gradient = value_and_gradient(term, spoilt, mask)
        assert torch.equal(result, expected)
        assert torch.equal(gradient, expected_gradient)
        assert (gradient[~mask] == 0).all()
    if term.from_weights:
        return
    alone, gradient_alone = value_and_gradient(term, values[mask])
    assert_close(expected, alone, tolerance(alone, n=T, wide=F64, stored=F64))
    atol = tolerance(gradient_alone, n=T, wide=F64, stored=F64)
    assert_close(expected_gradient[mask], gradient_alone, atol)


@every_term
@pytest.mark.parametrize("num_tokens", [0, 6])
def test_without_a_counted_token_it_is_zero(term: Term, num_tokens: int) -> None:
    masks = [torch.zeros(num_tokens, dtype=torch.bool)] + ([None] if num_tokens == 0 else [])
    for mask in masks:
        result, gradient = value_and_gradient(term, term.draw(num_tokens), mask)
        assert result == 0
        assert gradient.shape == (num_tokens, K if term.from_weights else E)
        assert (gradient == 0).all()


@every_term
def test_any_number_of_threads_gives_the_same_bits(term: Term) -> None:
    values, mask = term.draw(5000, F32), torch.rand(5000) > 0.2
    seen = []
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        seen.append(value_and_gradient(term, values, mask))
    for result, gradient in seen[1:]:
        assert torch.equal(result, seen[0][0])
        assert torch.equal(gradient, seen[0][1])


@every_term
@pytest.mark.parametrize("dtype", [F32, *NARROW])
def test_is_formed_in_float32_or_wider(term: Term, dtype: torch.dtype) -> None:
    values = term.draw(dtype=dtype)
    result, gradient = value_and_gradient(term, values)
    expected, expected_gradient = value_and_gradient(term.expect, values.double())
    assert result.dtype == F32
    assert gradient.dtype == dtype
    # load_loss divides a difference of two logits by the deviation, here down to 1 / E.
    n = T + E * E
    assert_close(result, expected, tolerance(expected, n=n, wide=F32, stored=F32))
    atol = tolerance(expected_gradient, n=n, wide=F32, stored=dtype)
    assert_close(gradient, expected_gradient, atol)


@every_term
def test_leaves_its_inputs_alone(term: Term) -> None:
    values = term.draw()
    before = values.clone()
    term(values, torch.rand(T) > 0.5)
    assert torch.equal(values, before)


# --- extreme logits -----------------------------------------------------------------------------

ROWS = {
    "large": [1e4, -1e4, 0.0, 1.0, -1e4],
    "all_large": [1e4] * 5,
    "all_small": [-1e4] * 5,
    # exp of it is below the smallest normal float32, where a sigmoid nearly is 0.
    "underflow": [-100.0] * 5,
    "one_absent": [0.5, -INF, 0.25, 1.0, -2.0],
    "two_absent": [0.5, -INF, 0.25, -INF, -2.0],
    "one_left": [-INF, -INF, 0.25, -INF, -INF],
}


@every_entropy
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_entropies_of_extreme_logits_are_finite(term: Term, row: str, dtype: torch.dtype) -> None:
    for rows in ([ROWS[row]], [ROWS[row], [0.1, 0.2, 0.3, 0.4, 0.5]]):
        result, gradient = value_and_gradient(term, torch.tensor(rows, dtype=dtype))
        assert result.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_of_extreme_logits_is_finite(row: str, top_k: int) -> None:
    for rows in ([ROWS[row]], [ROWS[row], [0.1, 0.2, 0.3, 0.4, 0.5]]):
        logits = torch.tensor(rows)
        result, gradient = value_and_gradient(
            lambda z, mask: losses.load_loss(z, top_k, token_mask=mask), logits
        )
        assert result.isfinite()
        assert gradient.isfinite().all()


def test_certain_tokens_have_no_local_entropy() -> None:
    logits = torch.eye(4) * 1e4
    assert losses.local_entropy_loss(logits, score_function="softmax") == 0
    assert losses.global_entropy_loss(logits, score_function="softmax").abs() < 1e-6
    got = losses.mutual_information_loss(logits, score_function="softmax")
    assert got.item() == pytest.approx(-math.log(4))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"load_loss: top_k must be in \[1, 5\], got 0"),
        ({"top_k": 6}, r"load_loss: top_k must be in \[1, 5\], got 6"),
        ({"deviation": 0.0}, r"load_loss: deviation must be a finite number > 0, got 0.0"),
        ({"deviation": -1.0}, r"load_loss: deviation must be a finite number > 0, got -1.0"),
        ({"deviation": NAN}, r"load_loss: deviation must be a finite number > 0, got nan"),
        ({"deviation": INF}, r"load_loss: deviation must be a finite number > 0, got inf"),
    ],
)
def test_load_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        losses.load_loss(torch.randn(3, E), **({"top_k": 2} | arguments))


@pytest.mark.parametrize(
    "loss",
    [losses.local_entropy_loss, losses.global_entropy_loss, losses.mutual_information_loss],
)
def test_an_unknown_score_function_is_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r'score_function must be one of .*, got "tanh"$'):
        loss(torch.randn(3, E), score_function="tanh")


def test_importance_refuses_a_mask_of_other_tokens() -> None:
    with pytest.raises(RuntimeError, match=r"token_mask must .*, got .* of shape \[3\]$"):
        losses.importance_loss(
            torch.rand(5, K), torch.zeros(5, K).long(), E, token_mask=torch.ones(3).bool()
        )


def test_the_terms_known_by_name() -> None:
    functions = {name for name in vars(losses) if name.endswith("_loss") and name[0] != "_"}
    assert set(losses.LOSSES) == functions | {"router_z_loss"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("load_loss", (2,)),
        ("local_entropy_loss", ()),
        ("global_entropy_loss", ()),
        ("mutual_information_loss", ()),
    ],
)
def test_shapes_that_do_not_fit(name: str, arguments: tuple[int, ...]) -> None:
    function, logits = getattr(losses, name), torch.zeros(6, 4)
    options = {} if arguments else {"score_function": "softmax"}
    for bad in (logits[0], logits.long()):
        message = rf"^{name}: logits must be \[num_tokens, num_experts\] and floating, got torch"
        with pytest.raises(RuntimeError, match=message):
            function(bad, *arguments, **options)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(6)):
        with pytest.raises(RuntimeError, match=rf"^{name}: token_mask must be bool .*\[6\], got"):
            function(logits, *arguments, token_mask=mask, **options)


def test_importance_of_weights_without_their_experts() -> None:
    message = r"^importance_loss: weights must be .*, got shapes \[5, 2\] and \[4, 2\]$"
    with pytest.raises(RuntimeError, match=message):
        losses.importance_loss(torch.ones(5, 2), torch.zeros(4, 2, dtype=torch.int64), 3)
