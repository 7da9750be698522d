"""How a layer calls its router: what routers read and return, and which parts are compatible."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from float_types import FLOATS
from plain_moe import gradients
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    ContextRouter,
    CosineRouter,
    ExpertChoiceRouter,
    Gate,
    HashRouter,
    MoE,
    Router,
    RouterOutput,
    SequenceRouter,
)
from torchmoe.nn.routers.context_router import route
from torchmoe.testing import gradcheck

H, INNER, E, K, B, S = 6, 7, 5, 2, 3, 8
F64 = torch.float64


def make(router: nn.Module, **options: Any) -> MoE:
    return MoE(H, INNER, E, K, router=router, **options)


class Returns(ContextRouter):
    """Whatever it was given."""

    def __init__(self, result: object, chooses: bool = False) -> None:
        super().__init__()
        self.num_experts = E
        self.result = result
        self.chooses = chooses
        self.seen: list[Any] = []

    def forward(
        self, x: Tensor, router_input: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Any:
        self.seen.append((x, router_input, token_mask))
        return self.result


class Plain(nn.Module):
    """The same for a router of logits."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.seen.append(x)
        return self.result


def test_any_module_may_be_a_router() -> None:
    linear = nn.Linear(H, E, dtype=F64)
    moe = make(linear, dtype=F64)
    x = torch.randn(B, S, H, dtype=F64)
    output = moe(x)
    assert torch.equal(output.routing.logits, linear(x.view(B * S, H)))
    assert output.routing.details == {}
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(moe).values())
    router = Router(H, E, bias=True, dtype=F64)
    router.load_state_dict(linear.state_dict())
    same = MoE(H, INNER, E, K, router=router, experts=moe.experts, dtype=F64)
    assert_close(same(x).hidden_states, output.hidden_states)


@pytest.mark.parametrize("kind", [Router, CosineRouter, nn.Linear])
def test_router_input_replaces_x_for_the_router_alone(kind: type[nn.Module]) -> None:
    width = 4
    moe = make(kind(width, E, dtype=F64), dtype=F64)
    x = torch.randn(B, S, H, dtype=F64)
    other = torch.randn(B, S, width, dtype=F64)
    output = moe(x, router_input=other)
    assert_close(output.routing.logits, moe.router(other.view(B * S, width)))
    expected = moe.experts(x.view(B * S, H), output.routing.indices, output.routing.weights)
    assert torch.equal(output.hidden_states.view(B * S, H), expected)
    with pytest.raises(RuntimeError):
        moe(x)


def test_the_router_gets_tokens_and_their_inputs_in_the_shape_they_have() -> None:
    x = torch.randn(2, B, S, H)
    mask = torch.rand(2, B, S) > 0.3
    ids = torch.randint(0, 9, (2, B, S))
    router = Returns(RouterOutput(torch.randn(2, B, S, E)))
    make(router)(x.masked_fill(~mask.unsqueeze(-1), torch.nan), token_mask=mask, router_input=ids)
    seen_x, seen_ids, seen_mask = router.seen[0]
    assert torch.equal(seen_x, x.masked_fill(~mask.unsqueeze(-1), 0))
    assert torch.equal(seen_ids, ids * mask)
    assert torch.equal(seen_mask, mask)
    make(router)(x)
    assert router.seen[1][0].shape == x.shape
    assert router.seen[1][1:] == (None, None)
    plain = Plain(torch.randn(2 * B * S, E))
    make(plain)(x, router_input=torch.randn(2, B, S, 4, 3))
    assert plain.seen[0].shape == (2 * B * S, 4, 3)


def test_x_need_not_be_contiguous() -> None:
    moe = make(SequenceRouter(Router(H, E)))
    x = torch.randn(S, B, H).transpose(0, 1)
    other = torch.randn(H, S, B).permute(2, 1, 0)
    mask = (torch.rand(S, B) > 0.3).T
    for tensor in (x, other):
        for own in (None, mask):
            expected = moe(tensor.contiguous(), token_mask=own).hidden_states
            assert torch.equal(moe(tensor, token_mask=own).hidden_states, expected)


@pytest.mark.parametrize("kind", [Router, CosineRouter, nn.Linear])
def test_what_router_input_holds_for_masked_tokens_does_not_matter(kind: type[nn.Module]) -> None:
    moe = make(kind(4, E, dtype=F64), dtype=F64)
    x = torch.randn(B, S, H, dtype=F64)
    other = torch.randn(B, S, 4, dtype=F64)
    mask = torch.rand(B, S) > 0.3
    seen = []
    for filler in (0.0, torch.nan, torch.inf):
        moe.zero_grad()
        leaf = other.masked_fill(~mask.unsqueeze(-1), filler).requires_grad_()
        output = moe(x, router_input=leaf, token_mask=mask)
        (output.hidden_states.square().sum() + output.aux_loss).backward()
        assert (leaf.grad[~mask] == 0).all()
        assert leaf.grad.abs().max() > 0
        seen.append([output.hidden_states, output.aux_loss, leaf.grad, *gradients(moe).values()])
    for actual in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(actual, seen[0], strict=True))


def test_derivative_of_router_input() -> None:
    moe = make(Router(4, E, dtype=F64), dtype=F64)
    x = torch.randn(4, H, dtype=F64)
    assert gradcheck(lambda other: moe(x, router_input=other), torch.randn(4, 4, dtype=F64))


@pytest.mark.parametrize("shape", [(), (B,), (S, B, H), (B * S, H), (B, S + 1)])
@pytest.mark.parametrize("kind", ["plain", "context"])
def test_router_input_must_have_the_leading_dimensions(kind: str, shape: tuple[int, ...]) -> None:
    router = Router(H, E)
    moe = make(router if kind == "plain" else SequenceRouter(router, pooling="given"))
    message = re.escape(
        f"MoE: router_input must have x's leading dimensions [3, 8], got shape {list(shape)}"
    )
    with pytest.raises(RuntimeError, match=message):
        moe(torch.randn(B, S, H), router_input=torch.rand(shape))


def test_the_example_of_the_documentation() -> None:
    lines = ContextRouter.__doc__.split("\n\n")
    start = next(i for i, part in enumerate(lines) if "class Neighbour" in part)
    code = "\n\n".join(lines[start : start + 2])
    indent = len(code) - len(code.lstrip())
    source = "\n".join(line[indent:] for line in code.split("\n"))
    names: dict[str, Any] = {
        "torch": torch,
        "ContextRouter": ContextRouter,
        "RouterOutput": RouterOutput,
    }
    exec(source, names)
    torch.manual_seed(0)
    moe = make(names["Neighbour"](H, E))
    x = torch.randn(B, S, H)
    routing = moe(x).routing
    linear = moe.router.linear
    logits = routing.logits.view(B, S, E)
    for s in range(S):
        before = x[:, s - 1] if s else torch.zeros(B, H)
        assert_close(logits[:, s], linear(torch.cat([x[:, s], before], dim=-1)))


LOGITS = torch.randn(B, S, E)


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        (Returns(LOGITS), TypeError, "MoE: router must return a RouterOutput, got Tensor"),
        (Returns((LOGITS, None)), TypeError, "MoE: router must return a RouterOutput, got tuple"),
        (Returns(None), TypeError, "MoE: router must return a RouterOutput, got NoneType"),
        (
            Returns(RouterOutput(LOGITS.view(B * S, E))),
            RuntimeError,
            "MoE: router must return [..., num_experts] = [3, 8, 5], got shape [24, 5]",
        ),
        (
            Returns(RouterOutput(LOGITS[..., :4])),
            RuntimeError,
            "MoE: router must return [..., num_experts] = [3, 8, 5], got shape [3, 8, 4]",
        ),
        (
            Returns(RouterOutput(None)),
            TypeError,
            "MoE: router must return logits, a tensor, got NoneType",
        ),
        (
            Returns(RouterOutput(LOGITS, torch.zeros(B, S, 2)), chooses=True),
            RuntimeError,
            "MoE: router must return indices of int64 with leading dimensions [3, 8], "
            "got torch.float32 of shape [3, 8, 2]",
        ),
        (
            Returns(RouterOutput(LOGITS, torch.zeros(B, S, 2, dtype=torch.int32)), chooses=True),
            RuntimeError,
            "MoE: router must return indices of int64 with leading dimensions [3, 8], "
            "got torch.int32 of shape [3, 8, 2]",
        ),
        (
            Returns(RouterOutput(LOGITS, torch.zeros(B * S, 2, dtype=torch.int64)), chooses=True),
            RuntimeError,
            "MoE: router must return indices of int64 with leading dimensions [3, 8], "
            "got torch.int64 of shape [24, 2]",
        ),
        (
            Returns(RouterOutput(LOGITS, torch.zeros(B, S, 2, dtype=torch.int64))),
            TypeError,
            "MoE: router must have chooses = True to return indices, got Returns without",
        ),
        (
            Plain(LOGITS),
            RuntimeError,
            "MoE: router must return [num_tokens, num_experts] = [24, 5], got shape [3, 8, 5]",
        ),
        (
            Plain((LOGITS, LOGITS)),
            TypeError,
            "MoE: router must return logits, a tensor, got tuple",
        ),
    ],
)
def test_what_a_router_must_not_return(
    router: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message) + "$"):
        make(router)(torch.randn(B, S, H))


@pytest.mark.parametrize("dtype", FLOATS)
def test_narrow_logits_are_widened(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    logits = LOGITS.to(dtype)
    for router in (Returns(RouterOutput(logits)), Plain(logits.view(B * S, E))):
        routing = make(router)(torch.randn(B, S, H)).routing
        assert routing.logits.dtype == routing.weights.dtype == wide
        assert torch.equal(routing.logits, logits.view(B * S, E).to(wide))


def test_indices_of_a_router_take_the_place_of_the_choice() -> None:
    indices = torch.tensor([4, -1, 2]).expand(B, S, 3)
    details = {"seen": torch.ones(2)}
    router = Returns(RouterOutput(LOGITS, indices, details), chooses=True)
    mask = torch.rand(B, S) > 0.3
    moe = make(router, gate=Gate(normalize="none"))
    routing = moe(torch.randn(B, S, H), token_mask=mask).routing
    expected = indices.masked_fill(~mask.unsqueeze(-1), -1).reshape(B * S, 3)
    assert torch.equal(routing.selected, expected)
    assert torch.equal(routing.indices, expected)
    count = int(mask.sum())
    assert routing.tokens_per_expert.tolist() == [0, 0, count, 0, count]
    probs = LOGITS.view(B * S, E).softmax(-1)
    kept = mask.flatten()
    assert_close(routing.weights[kept][:, [0, 2]], probs[kept][:, [4, 2]])
    assert (routing.weights[kept][:, 1] == 0).all()
    assert routing.details == details
    assert routing.details is not details


def test_the_routers_normalisation_counts_only_where_the_gate_leaves_it_open() -> None:
    router = Returns(RouterOutput(LOGITS))
    assert make(router).estimator.normalize == "topk"
    router.default_normalize = "none"
    assert make(router).estimator.normalize == "none"
    assert make(router, gate=Gate(normalize="topk")).estimator.normalize == "topk"


def test_route_alone() -> None:
    x = torch.randn(B, S, H)
    logits, *others = route(nn.Linear(H, E), x, E)
    assert logits.shape == (B * S, E)
    assert others == [None] * 4
    router = ExpertChoiceRouter(Router(H, E), K)
    logits, indices, *_ = route(router, x, E, token_mask=torch.ones(B, S, dtype=torch.bool))
    assert logits.shape == indices.shape == (B * S, E)


def choosing() -> ExpertChoiceRouter:
    return ExpertChoiceRouter(Router(H, E), K)


def by_sequence() -> SequenceRouter:
    return SequenceRouter(Router(H, E))


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (
            choosing(),
            {"balance": Balance(selection_bias_rate=0.01)},
            "MoE: balance.selection_bias_rate must be 0 with ExpertChoiceRouter, "
            "which chooses the experts itself, got 0.01",
        ),
        (
            HashRouter(E, K),
            {"balance": Balance(selection_bias_rate=0.01)},
            "MoE: balance.selection_bias_rate must be 0 with HashRouter, "
            "which chooses the experts itself, got 0.01",
        ),
        (
            choosing(),
            {"gate": Gate(num_groups=5, top_groups=2)},
            "MoE: gate.num_groups must be 1 with ExpertChoiceRouter, "
            "which chooses the experts itself, got 5",
        ),
        (
            HashRouter(E, K),
            {"gate": Gate(num_groups=5, top_groups=2)},
            "MoE: gate.num_groups must be 1 with HashRouter, "
            "which chooses the experts itself, got 5",
        ),
        (
            choosing(),
            {"gate": Gate(estimator="sparsemixer")},
            "MoE: gate.estimator must not draw each token's experts with ExpertChoiceRouter, "
            "which chooses the experts itself, got SparseMixer",
        ),
        (
            choosing(),
            {"gate": Gate(estimator="gumbel_straight_through")},
            "MoE: gate.estimator must not draw each token's experts with ExpertChoiceRouter, "
            "which chooses the experts itself, got GumbelStraightThrough",
        ),
        (
            by_sequence(),
            {"gate": Gate(estimator="sparsemixer")},
            "MoE: gate.estimator must not draw each token's experts with SequenceRouter, "
            "which decides once for each sequence, got SparseMixer",
        ),
        (
            HashRouter(E, K),
            {"gate": Gate(estimator="sparsemixer")},
            "MoE: gate.estimator must not draw each token's experts with HashRouter, "
            "which chooses the experts itself, got SparseMixer",
        ),
        (
            HashRouter(E, K),
            {"capacity": Capacity(1, overflow="next_best")},
            "MoE: capacity.overflow must not lead tokens to experts that HashRouter gives no "
            "score, got 'next_best'",
        ),
        (
            HashRouter(E, K),
            {"assistance": Assistance((1, 2, 3, 4, 0))},
            "MoE: router must keep usage for assistance, as Router(track_usage=True) does, "
            "got HashRouter without",
        ),
        (
            choosing(),
            {"gate": Gate("sigmoid")},
            "MoE: router must have score_function sigmoid, got softmax",
        ),
        (HashRouter(E, 1), {}, "MoE: router must have top_k 2, got 1"),
        (ExpertChoiceRouter(Router(H, E), 3), {}, "MoE: router must have top_k 2, got 3"),
        (HashRouter(4, K), {}, "MoE: router must have num_experts 5, got 4"),
        (CosineRouter(H, 4), {}, "MoE: router must have num_experts 5, got 4"),
        (SequenceRouter(Router(H, 4)), {}, "MoE: router must have num_experts 5, got 4"),
        (
            ExpertChoiceRouter(nn.Linear(H, 4), K),
            {},
            "MoE: router must have num_experts 5, got 4",
        ),
    ],
)
def test_parts_that_do_not_go_together(
    router: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        make(router, **options)


def test_a_router_that_does_not_choose_may_have_a_top_k_of_its_own() -> None:
    class Mine(nn.Linear):
        top_k = 1

    make(Mine(H, E))(torch.randn(B, S, H))


def test_a_router_that_tells_nothing_is_asked_for_nothing() -> None:
    """Whatever its attributes are called."""

    class Mine(nn.Linear):
        chooses = True
        tells_noise = True

    router = Mine(H, E)
    router.register_buffer("usage", torch.full((E,), 1 / E))
    moe = make(router)
    moe.update(moe(torch.randn(B, S, H)).routing)
    assert torch.equal(router.usage, torch.full((E,), 1 / E))
    with pytest.raises(ValueError, match=r"^MoE: router must keep usage for .*, got Mine without$"):
        make(router, balance=Balance(fraction_from="history"))


def test_router_input_of_one_masked_token() -> None:
    moe = make(HashRouter(E, K))
    output = moe(torch.randn(H), router_input=torch.tensor(3), token_mask=torch.tensor(False))
    assert not output.hidden_states.any()


@pytest.mark.parametrize("router_input", [[1], "ids"])
def test_router_input_must_be_a_tensor(router_input: Any) -> None:
    message = r"MoE: router_input must be a tensor or None, got (list|str)"
    with pytest.raises(TypeError, match=message):
        make(Router(H, E))(torch.randn(B, S, H), router_input=router_input)


def test_parts_that_do() -> None:
    x = torch.randn(B, S, H)
    make(choosing(), capacity=Capacity(1, overflow="next_best"))(x)
    make(by_sequence(), balance=Balance(selection_bias_rate=0.01))(x)
    make(by_sequence(), gate=Gate(num_groups=5, top_groups=2))(x)
    make(Router(H, E), gate=Gate(estimator="sparsemixer"))(x)
    for name in ("straight_through", "straight_through_dense", "default_vector"):
        make(by_sequence(), gate=Gate(estimator=name))(x)
        make(choosing(), gate=Gate(estimator=name))(x)


@pytest.mark.parametrize("rate", [0.01])
def test_a_selection_bias_keeps_a_sequence_together(rate: float) -> None:
    moe = make(by_sequence(), balance=Balance(selection_bias_rate=rate))
    moe.selection_bias.copy_(torch.randn(E))
    ids = moe(torch.randn(B, S, H)).routing.selected.view(B, S, K)
    assert torch.equal(ids, ids[:, :1].expand(B, S, K))
