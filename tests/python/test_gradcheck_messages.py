"""What gradcheck says: of a fault, of modes that are refused, and of its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from torchmoe.nn import ExpertList, MoE
from torchmoe.testing import gradcheck
from torchmoe.testing._progress import ProgressLines

H, INNER, E, K, T = 8, 6, 4, 2, 9


class Identity(torch.autograd.Function):
    """The identity with another backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.given = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.given(grad), None


class LinearRouter(nn.Module):
    """Logits with another gradient of the weight."""

    def __init__(self, backward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self._backward = backward

    def forward(self, x: Tensor) -> Tensor:
        return x @ Identity.apply(self.weight, self._backward).T


def message_of(function: Callable[..., Any], inputs: Tensor) -> str:
    with pytest.raises(GradcheckError) as error:
        gradcheck(function, inputs)
    return str(error.value)


def test_half_a_router_gradient_is_one_screen() -> None:
    layer = MoE(H, INNER, E, K, router=LinearRouter(lambda grad: grad / 2))
    text = message_of(layer, torch.randn(T, H))
    assert text.startswith("gradcheck: the gradient of router.weight must be the derivative of")
    lines = text.splitlines()
    assert len(lines) <= 24
    assert "tensor         entry" in lines[2]
    row = lines[3].split()
    assert row[0] == "router.weight"
    expected, got, bound = (float(number) for number in row[3:6])
    assert got == pytest.approx(expected / 2, rel=1e-5)
    assert bound < 1e-5 * abs(expected)
    assert "hidden_states" in row
    entry = [int(i.strip("[,]")) for i in row[1:3]]
    assert f"expert {entry[0]}, token" in lines[3]
    assert "Found nothing wrong with inputs[0], experts.gate_up_proj, experts.down_proj." in lines
    assert "got is 0.5 times expected all over router.weight" in lines[-1]


def zeroed_row(grad: Tensor) -> Tensor:
    return grad.masked_fill(torch.arange(len(grad)).reshape(-1, 1) == 2, 0)


def as_it_lies(grad: Tensor) -> Tensor:
    if grad.untyped_storage().nbytes() < grad.nbytes:
        return grad
    return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


@pytest.mark.parametrize(
    ("backward", "meaning"),
    [
        (torch.neg, "a sign is turned: got is -1 times expected all over inputs[0]"),
        (torch.zeros_like, "no gradient arrives at inputs[0]: detach()"),
        (zeroed_row, "no gradient arrives at inputs[0][2]"),
        (lambda grad: grad * torch.nan, "multiplies 0 by infinity"),
        (as_it_lies, "reads the memory of the incoming gradient as if it were contiguous"),
        (lambda grad: grad.square(), "not the derivative of the forward pass, or a path"),
    ],
)
def test_it_says_what_that_usually_means(
    backward: Callable[[Tensor], Tensor], meaning: str
) -> None:
    assert meaning in message_of(lambda x: Identity.apply(x, backward), torch.randn(T, H))


def test_a_token_is_named_with_its_experts() -> None:
    layer = MoE(H, INNER, E, K).double()
    text = message_of(
        lambda x: layer(Identity.apply(x, zeroed_row)).hidden_states, torch.randn(T, H)
    )
    chosen = layer(torch.zeros(1, H, dtype=torch.float64)).routing.indices.shape[-1]
    assert chosen == K
    assert "token 2, experts [" in text


def test_an_expert_in_a_list_is_named() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, Identity.apply(self.weight, lambda g: 2 * g), self.bias)

    experts = ExpertList([nn.Linear(H, H), Doubled(H, H), nn.Linear(H, H), nn.Linear(H, H)])
    text = message_of(MoE(H, None, E, K, experts=experts), torch.randn(T, H))
    assert "expert 1, tokens " in text


# --- layers of other make -----------------------------------------------------------------------


def mixtral(act_fn: nn.Module | None = None) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    block = modeling.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    if act_fn is not None:
        block.experts.act_fn = act_fn
    return block


class SlopeOff(nn.Module):
    """SiLU with a derivative that is off by 3e-4."""

    def forward(self, u: Tensor) -> Tensor:
        return nn.functional.silu(u) + 3e-4 * (u - u.detach())


def test_mixtral_with_its_softmax_in_float32_is_right() -> None:
    assert gradcheck(mixtral(), torch.randn(1, T, H))


def test_a_wrong_activation_behind_a_softmax_in_float32_is_seen() -> None:
    text = message_of(mixtral(SlopeOff()), torch.randn(1, T, H))
    assert "experts.gate_up_proj" in text.splitlines()[0]
    assert "experts.down_proj" in text.split("Found nothing wrong with")[1]


def test_kinks_inside_an_op_are_no_fault() -> None:
    assert gradcheck(MoE(H, INNER, E, K, activation="reglu"), torch.randn(T, H))


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_modes_of_what_torch_differentiates(full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    linear = nn.Linear(3, 2)
    assert gradcheck(
        linear, torch.randn(5, 3), full=full, check_forward_ad=True, check_batched_grad=True
    )
    assert "refused" not in capsys.readouterr().err


def written_in_place(grad: Tensor) -> Tensor:
    made = torch.zeros(grad.shape, dtype=grad.dtype)
    made += grad
    return made


@pytest.mark.parametrize("full", [False, True])
def test_a_refused_mode_is_said_and_no_fault(
    full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def f(x: Tensor) -> Tensor:
        return Identity.apply(x, written_in_place)

    x = torch.randn(3, 2)
    assert gradcheck(f, x, full=full, check_forward_ad=True, check_batched_grad=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("gradcheck: forward derivatives are refused, NotImplementedError")
    assert lines[1].startswith("gradcheck: batched derivatives are refused, RuntimeError: vmap")


class WrongTangent(torch.autograd.Function):
    """x^2 with a tangent that is off by a factor."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * tangent


def test_a_wrong_tangent_is_found() -> None:
    assert gradcheck(WrongTangent.apply, torch.randn(3, 2))
    for full in (False, True):
        with pytest.raises(GradcheckError, match=r"forward derivatives are not: a rule") as error:
            gradcheck(WrongTangent.apply, torch.randn(3, 2), full=full, check_forward_ad=True)
        assert len(str(error.value).splitlines()) < 10


def doubled_in_a_batch(grad: Tensor) -> Tensor:
    return grad * (2 if torch._C._functorch.is_legacy_batchedtensor(grad) else 1)


def test_a_wrong_batch_is_found() -> None:
    def f(x: Tensor) -> Tensor:
        return Identity.apply(x, doubled_in_a_batch)

    assert gradcheck(f, torch.randn(3, 2))
    with pytest.raises(GradcheckError, match=r"batched derivatives are not: a rule"):
        gradcheck(f, torch.randn(3, 2), check_batched_grad=True)


# --- options and progress -----------------------------------------------------------------------


def test_options_of_torch_belong_to_the_full_check() -> None:
    with pytest.raises(ValueError, match=r"gradcheck: atol must be given with full=True, as an"):
        gradcheck(torch.sin, torch.randn(3), atol=1e-3)
    assert gradcheck(torch.sin, torch.randn(3), full=True, atol=1e-3)


def test_an_output_without_a_gradient() -> None:
    with pytest.raises(ValueError, match=r"must return a floating-point tensor that requires a"):
        gradcheck(lambda x: x.detach(), torch.randn(3))


def test_a_long_check_says_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    short = ProgressLines("gradcheck")
    for done in range(3):
        short(done, 2, 0.5)
    assert capsys.readouterr().err == ""
    long = ProgressLines("gradcheck")
    long(0, 40, 30.0)
    assert capsys.readouterr().err == "gradcheck: about 30 s for 40 steps\n"
    long(1, 40, 30.0)
    assert capsys.readouterr().err == ""
    long._last -= 6
    long._began -= 6
    long(10, 40, 30.0)
    assert capsys.readouterr().err == "gradcheck: 10 of 40 steps, about 18 s left\n"
