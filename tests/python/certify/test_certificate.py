"""What a certificate holds, and what certify leaves alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify.layers.correct import CORRECT
from certify.layers.foreign import HardMoE, PlainLoop, StoredLossMoE
from certify.mutants.registry import all_mutants
from torchmoe import Adapter
from torchmoe.nn import MoE, WithAttachedLoss
from torchmoe.testing import Certificate, certify, known_laws

QUICK = ["router_gradient", "symmetry"]


@pytest.fixture(scope="module")
def failing() -> Certificate:
    """Of a router that learns nothing from the task."""
    return certify(all_mutants()["router_weights_detached"].make(0), laws=QUICK)


def test_a_correct_layer_is_true() -> None:
    certificate = certify(MoE(6, 5, 4, 2), laws=QUICK)
    assert certificate
    assert certificate.passed
    assert certificate.failures == ()
    assert certificate.laws == tuple(QUICK)


def test_a_finding_says_what_is_wrong(failing: Certificate) -> None:
    assert not failing
    (finding,) = failing.failures
    assert finding.law == "router_gradient"
    assert finding.where == "d/d router.weight"
    assert (finding.expected, finding.got) == ("a gradient other than 0", "None")
    assert finding.num_tokens == 1
    assert finding.smallest_input.startswith("seed 0, x [1, 6] = [")
    assert "detached" in finding.meaning
    assert (failing.held("router_gradient"), failing.held("symmetry")) == ("broken", "held")


def test_the_smallest_input() -> None:
    """A softmax over the batch's tokens shows with two of them and not with one."""
    layer = all_mutants()["top1_normalised_over_tokens"].make(0)
    certificate = certify(layer, laws=["accumulation"])
    assert {finding.num_tokens for finding in certificate.failures} == {2}


def test_as_text_and_data(failing: Certificate) -> None:
    text, markdown = str(failing), failing.to_markdown()
    for shown in (text, markdown):
        assert "not passed: 1 of 2 laws broken" in shown
        assert "d/d router.weight" in shown
        for law in known_laws():
            assert (law.formula.replace("|", "\\|") in shown or law.formula in shown) == (
                law.name in QUICK
            )
    data = json.loads(failing.to_json())
    assert data["passed"] is False
    assert data["failures"][0]["law"] == "router_gradient"


def _state(layer: nn.Module) -> dict[str, Tensor | None]:
    state: dict[str, Tensor | None] = {n: t.clone() for n, t in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        state[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    return state


@pytest.mark.parametrize("make", [lambda: MoE(6, 5, 4, 2), StoredLossMoE], ids=["own", "stored"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_left_as_it_was(make: Callable[[], nn.Module], training: bool) -> None:
    layer = make().train(training)
    if isinstance(layer, StoredLossMoE):
        layer(torch.randn(5, 6)).sum().backward()
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(layer)
    state, kept = _state(layer), getattr(layer, "aux_loss", None)
    draws = torch.get_rng_state()
    certify(layer, laws=["router_gradient", "idle_experts", "balance"])
    assert torch.equal(torch.get_rng_state(), draws)
    assert layer.training is training
    assert getattr(layer, "aux_loss", None) is kept
    after = _state(layer)
    assert after.keys() == state.keys()
    for name, before in state.items():
        now = after[name]
        assert (before is None) == (now is None)
        assert before is None or now is None or torch.equal(before, now)


@pytest.mark.parametrize("name", ["own", "mixtral", "plain_loop"])
def test_at_most_two_laws_are_not_asked(name: str) -> None:
    certificate = certify(CORRECT[name](0))
    gaps = [law for law in certificate.laws if certificate.held(law) == "not asked"]
    assert certificate
    assert len(gaps) <= 2
    (request,) = [gap for gap in certificate.not_asked if gap.law == "replicas"]
    assert request.why == 'on request: laws=["replicas"]'


def test_a_loss_that_is_kept_as_an_attribute() -> None:
    """It is found; and under a reentrant checkpoint it has lost its graph, which is found too."""
    certificate = certify(StoredLossMoE(), laws=["balance", "recomputation"])
    assert certificate.held("balance") == "held"
    assert {f.clause.split(":")[0] for f in certificate.failures} == {"reentrant checkpoint"}


def test_what_is_replaced_and_not_declared_is_said() -> None:
    undeclared = nn.Sequential(WithAttachedLoss(MoE(6, 5, 4, 2)))
    certificate = certify(undeclared, laws=["gradients"])
    assert not certificate
    assert "attach_loss in the layer replaces the derivative on purpose" in str(certificate)


class _Tail(torch.autograd.Function):
    """Loses the gradient of all rows but an expert's first 16, as a kernel without a rest."""

    @staticmethod
    def forward(ctx, rows):
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[:16], torch.zeros_like(grad[16:])])


class _TailMoE(PlainLoop):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            rows = expert(_Tail.apply(x[token]))
            y = y.index_add(0, token, weights[token, slot, None] * rows)
        return y


def test_more_rows_than_a_block() -> None:
    (finding, *_) = certify(_TailMoE(), laws=["accumulation"]).failures
    assert finding.clause == "a large batch is its parts"
    assert finding.where.startswith("d/d x[")
    assert finding.num_tokens > 64
    assert f"x [{finding.num_tokens}, 6]" in finding.smallest_input


class _Leaking(PlainLoop):
    """A third of a token's output reaches the next one; weights pass through bfloat16."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x)[0].bfloat16().to(x.dtype)
        return y + 0.3 * y.roll(1, 0)


def test_sixteen_bits_on_the_way_hide_no_fault() -> None:
    assert certify(_Leaking(), laws=["symmetry"]).held("symmetry") == "broken"


class _Unused(PlainLoop):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.w1(x))[0]


def test_what_differs_by_a_number_is_not_an_expert() -> None:
    findings = certify(_Unused(), laws=["idle_experts"]).failures
    assert {finding.where for finding in findings} == {"d/d w2.weight", "d/d w2.bias"}


def test_nothing_of_a_mixture_is_no_pass() -> None:
    certificate = certify(nn.Linear(6, 6), laws=["router_gradient", "symmetry"])
    assert not certificate
    assert not certificate.failures
    assert certificate.held("router_gradient") == "not asked"


def test_what_cannot_be_measured_is_told() -> None:
    class Tied(PlainLoop):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, logits = super().forward(x)
            return y, torch.zeros_like(logits).detach()

    layer = Tied()
    nn.init.zeros_(layer.gate.weight)
    certificate = certify(layer, laws=["gradients"])
    assert certificate.held("gradients") == "in part"
    assert not certificate


def test_a_mode_without_gradients_around_it() -> None:
    with torch.inference_mode():
        assert certify(MoE(6, 5, 4, 2), laws=QUICK)


def test_hooks_of_parameters_are_told() -> None:
    layer = MoE(6, 5, 4, 2)
    layer.router.weight.register_hook(lambda grad: grad / 2)
    notes = certify(layer, laws=["router_gradient"]).notes
    assert "copies have no hooks of parameters, as of router.weight here" in notes


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(router="nope"), "router must be the path of a part of PlainLoop, got 'nope'"),
        (Adapter(experts="nope"), "experts must be the path of a part of PlainLoop, got 'nope'"),
        (Adapter(token_mask="nope"), "token_mask must be a keyword of forward that takes"),
        (Adapter(aux_loss="nope"), "'nope' must be a field of what PlainLoop returns or an attr"),
    ],
)
def test_an_adapter_for_another_layer(adapter: Adapter, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        certify(PlainLoop(), adapter=adapter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"laws": []}, "laws must be .* got none"),
        ({"inputs": torch.randn(6)}, r"inputs must be tokens \[..., H\], got shape \[6\]"),
        ({"inputs": torch.randn(0, 6)}, r"inputs must be tokens .* got shape \[0, 6\]"),
        ({"inputs": torch.full((3, 6), torch.nan)}, "inputs must be finite"),
    ],
)
def test_nothing_to_ask_with(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(PlainLoop(), **arguments)


class _WrongSurrogate(HardMoE):
    def surrogate(self, x: Tensor) -> Tensor:
        return self._mix(x, lambda score: 2 * score - score.detach())


def test_a_surrogate_is_compared_with() -> None:
    assert certify(HardMoE(), laws=["router_gradient", "gradients"])
    (law,) = {f.law for f in certify(_WrongSurrogate(), laws=["router_gradient"]).failures}
    assert law == "router_gradient"


class _SlightlyWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid)) * (1 + 3e-4)


class _SlightlyWrongSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _SlightlyWrong.apply(x)


def test_a_small_error_beside_a_float32_softmax() -> None:
    layer = CORRECT["mixtral"](0)
    assert certify(layer, laws=["gradients"])
    layer.experts.act_fn = _SlightlyWrongSiLU()
    assert {f.law for f in certify(layer, laws=["gradients"]).failures} == {"gradients"}


def test_inputs_and_sizes_that_cannot_be_seen() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = PlainLoop()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    with pytest.raises(ValueError, match="certify: hidden_size must be given"):
        certify(nn.Identity())
    assert certify(Bare(), hidden_size=6, laws=["symmetry"])
    assert certify(Bare(), inputs=torch.rand(4, 6), laws=["symmetry"])


def test_what_cannot_be_certified() -> None:
    with pytest.raises(RuntimeError, match=r"certify: layer must map \[T, H\] or \[1, T, H\]"):
        certify(nn.Linear(6, 3), hidden_size=6)
    with pytest.raises(TypeError, match="Adapter: hidden_states must be found"):
        certify(nn.Identity(), hidden_size=6, adapter=Adapter(hidden_states=lambda *_: None))


def test_a_layer_that_raises_is_a_finding() -> None:
    class NoBackward(PlainLoop):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, logits = super().forward(x)
            if y.requires_grad:
                y.register_hook(lambda grad: 1 / 0)
            return y, logits

    (finding,) = certify(NoBackward(), laws=["accumulation"]).failures
    assert (finding.clause, finding.where) == ("runs", "the layer")
    assert "ZeroDivisionError" in finding.got


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"laws": "gradients"}, TypeError, 'laws must be "all" or a list of names'),
        ({"laws": ["gravity"]}, ValueError, "laws must be one of"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float64 or torch.float32"),
        ({"inputs": [1.0]}, TypeError, "inputs must be a floating-point tensor"),
        ({"adapter": "gate"}, TypeError, "adapter must be an Adapter"),
    ],
)
def test_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"certify: {message}"):
        certify(PlainLoop(), **arguments)


@pytest.mark.slow
class _DividedByProcesses(PlainLoop):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, logits = super().forward(x)
        started = torch.distributed.is_initialized()
        number = torch.distributed.get_world_size() if started else 1
        return y, logits.softmax(-1).mean(0).square().sum() / number


def test_replicas_on_request() -> None:
    assert certify(PlainLoop(), laws=["replicas"])
    skipping = all_mutants()["idle_expert_skipped"].make(0)
    certificate = certify(skipping, laws=["replicas"])
    assert {finding.where for finding in certificate.failures} == {"DistributedDataParallel"}
    assert "take no part in a pass" in certificate.failures[0].meaning
    shared = certify(_DividedByProcesses(), laws=["replicas"]).failures
    assert {(finding.clause, finding.where) for finding in shared} == {
        ("aux_loss of a process", "aux_loss")
    }
