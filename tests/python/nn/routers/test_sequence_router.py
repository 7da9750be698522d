"""One decision for a whole sequence: the poolings, padding, who sees what, derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from plain_moe import gradients
from torchmoe.nn import (
    Balance,
    CosineRouter,
    ExpertChoiceRouter,
    Gate,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
)
from torchmoe.testing import gradcheck

H, INNER, E, K, B, S = 6, 7, 5, 2, 3, 8
F64 = torch.float64
POOLINGS = ("attention", "given", "mean", "first")
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def make_router(pooling: str, inner: nn.Module | None = None) -> SequenceRouter:
    """With a query that is not 0."""
    router = SequenceRouter(inner or Router(H, E, bias=True, dtype=F64), pooling=pooling)
    if router.query is not None:
        nn.init.normal_(router.query)
    return router


def make(pooling: str, **options: Any) -> MoE:
    return MoE(H, INNER, E, K, router=make_router(pooling), dtype=F64, **options)


def given_for(pooling: str, *leading: int) -> Tensor | None:
    return torch.rand(leading, dtype=F64) + 0.1 if pooling == "given" else None


def lengths_mask(*lengths: int, left: bool = False) -> Tensor:
    """[B, S], the counted tokens first, or last."""
    mask = torch.arange(S) < torch.tensor(lengths).unsqueeze(1)
    return mask.flip(1) if left else mask


def plain_weights(
    router: SequenceRouter, tokens: list[list[float]], given: list[float] | None, mask: list[bool]
) -> list[float]:
    """The pooling weights of one sequence."""
    counted = [s for s in range(len(tokens)) if mask[s]]
    raw = [0.0] * len(tokens)
    for s in counted:
        if router.pooling == "attention":
            dot = sum(q * v for q, v in zip(router.query.tolist(), tokens[s], strict=True))
            raw[s] = math.exp(dot / math.sqrt(len(tokens[s])))
        elif router.pooling == "given":
            raw[s] = given[s]
        else:
            raw[s] = 1.0 if router.pooling == "mean" or s == counted[0] else 0.0
    total = sum(raw)
    return [value / total if total else 0.0 for value in raw]


def plain_pooling(
    router: SequenceRouter, x: Tensor, given: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weights [B, S], gate inputs [B, H])."""
    weights, inputs = [], []
    for b in range(x.shape[0]):
        counts = [True] * x.shape[1] if mask is None else mask[b].tolist()
        tokens = x[b].tolist()
        own = plain_weights(router, tokens, None if given is None else given[b].tolist(), counts)
        weights.append(own)
        inputs.append(
            [
                sum(own[s] * tokens[s][h] for s in range(len(tokens)) if counts[s])
                for h in range(x.shape[2])
            ]
        )
    return torch.tensor(weights, dtype=F64), torch.tensor(inputs, dtype=F64)


@every_pooling
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_pools_as_a_loop_does(pooling: str, padding: bool, left: bool, cosine: bool) -> None:
    inner = CosineRouter(H, E, dtype=F64) if cosine else None
    router = make_router(pooling, inner)
    moe = MoE(H, INNER, E, K, router=router, dtype=F64)
    x, given = torch.randn(B, S, H, dtype=F64), given_for(pooling, B, S)
    mask = lengths_mask(5, 0, 8, left=left) if padding else None
    weights, inputs = plain_pooling(router, x, given, mask)
    if padding:  # what padding holds does not matter
        x = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
        given = None if given is None else given.masked_fill(~mask, torch.nan)
    routing = moe(x, token_mask=mask, router_input=given).routing
    assert_close(routing.details["pooling_weights"], weights)
    assert_close(routing.details["gate_input"], inputs)
    assert_close(routing.logits.view(B, S, E), router.router(inputs).unsqueeze(1).expand(B, S, E))
    totals = torch.ones(B, dtype=F64) if mask is None else mask.any(dim=1).double()
    assert_close(routing.details["pooling_weights"].sum(dim=1), totals)


@every_pooling
def test_all_tokens_of_a_sequence_have_the_same_experts(pooling: str) -> None:
    moe = make(pooling)
    x = torch.randn(B, S, H, dtype=F64)
    mask = lengths_mask(5, 1, 8)
    routing = moe(x, token_mask=mask, router_input=given_for(pooling, B, S)).routing
    logits, ids = routing.logits.view(B, S, E), routing.selected.view(B, S, K)
    assert torch.equal(logits, logits[:, :1].expand(B, S, E))
    for b in range(B):
        assert (ids[b, mask[b]] == ids[b, 0]).all()
        assert (ids[b, ~mask[b]] == -1).all()
    assert len({tuple(row) for row in ids[:, 0].tolist()}) > 1
    assert torch.equal(ids[:, 0], logits[:, 0].topk(K).indices)


@every_pooling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_padding_alone(pooling: str, dtype: torch.dtype) -> None:
    router = make_router(pooling).to(dtype)
    moe = MoE(H, INNER, E, K, router=router, dtype=dtype)
    leaf = torch.randn(B, S, H, dtype=dtype)
    mask = lengths_mask(3, 0, 8)
    leaf[~mask] = torch.nan
    leaf.requires_grad_()
    given = given_for(pooling, B, S)
    if given is not None:
        given = given.to(dtype).masked_fill(~mask, torch.nan).requires_grad_()
    output = moe(leaf, token_mask=mask, router_input=given)
    details = output.routing.details
    assert (details["pooling_weights"][1] == 0).all()
    assert (details["gate_input"][1] == 0).all()
    assert (output.hidden_states[1] == 0).all()
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~mask] == 0).all()
    if given is not None:
        assert given.grad.isfinite().all()
        assert (given.grad[~mask] == 0).all()


@every_pooling
@pytest.mark.parametrize(
    "leading", [(B, 1), (B, 0), (0, S), (0, 0), (S,), (1,), (0,), (2, B, S), (2, 0, S)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_sizes(pooling: str, leading: tuple[int, ...], masked: bool) -> None:
    moe = make(pooling)
    x = torch.randn(*leading, H, dtype=F64, requires_grad=True)
    given = given_for(pooling, *leading)
    mask = torch.ones(leading, dtype=torch.bool) if masked else None
    output = moe(x, router_input=given, token_mask=mask)
    assert output.hidden_states.shape == x.shape
    details = output.routing.details
    assert details["pooling_weights"].shape == leading
    assert details["gate_input"].shape == (*leading[:-1], H)
    output.hidden_states.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(moe).values())
    rows = x.detach().reshape(-1, leading[-1], H) if x.numel() else None
    if rows is not None:
        flat = None if given is None else given.reshape(-1, leading[-1])
        weights, inputs = plain_pooling(moe.router, rows, flat, None)
        assert_close(details["pooling_weights"].reshape(weights.shape), weights)
        assert_close(details["gate_input"].reshape(inputs.shape), inputs)


@every_pooling
def test_neither_padding_nor_neighbours_matter(pooling: str) -> None:
    moe = make(pooling)
    x, given = torch.randn(B, S, H, dtype=F64), given_for(pooling, B, S)
    mask = lengths_mask(5, 3, 8)
    whole = moe(x, token_mask=mask, router_input=given)
    for b, length in enumerate((5, 3, 8)):
        own = None if given is None else given[b, :length]
        alone = moe(x[b, :length], router_input=own)
        assert_close(whole.hidden_states[b, :length], alone.hidden_states)
        assert_close(whole.routing.details["gate_input"][b], alone.routing.details["gate_input"])


@pytest.mark.parametrize("changed", ["later", "earlier"])
@every_pooling
def test_who_sees_later_tokens(pooling: str, changed: str) -> None:
    moe = make(pooling)
    x, given = torch.randn(B, S, H, dtype=F64), given_for(pooling, B, S)
    expected = moe(x, router_input=given).hidden_states
    cut = 4
    other = x.clone()
    where = slice(cut, None) if changed == "later" else slice(cut)
    other[:, where] = torch.randn_like(other[:, where])
    kept = slice(cut) if changed == "later" else slice(cut, None)
    actual = moe(other, router_input=given).hidden_states
    same = torch.equal(actual[:, kept], expected[:, kept])
    assert same == (pooling == "first" and changed == "later")
    assert (moe.router.looks_ahead is None) == (pooling == "first")
    if pooling != "first":
        assert moe.router.looks_ahead == (
            f'with pooling "{pooling}" decides by all tokens of a sequence, later ones included'
        )


def test_first_finds_the_first_token_that_counts() -> None:
    router = make_router("first")
    x = torch.randn(B, S, H, dtype=F64)
    mask = lengths_mask(5, 1, 8, left=True)
    mask[0, 4] = False  # holes as well
    output = router(x, token_mask=mask)
    first = torch.tensor([3, 7, 0])
    assert torch.equal(output.details["pooling_weights"], nn.functional.one_hot(first, S).double())
    assert torch.equal(output.details["gate_input"], x[torch.arange(B), first])


def test_given_weights_are_normalised_and_get_a_gradient() -> None:
    moe = make("given")
    x = torch.randn(B, S, H, dtype=F64)
    given = given_for("given", B, S).requires_grad_()
    output = moe(x, router_input=given)
    scaled = moe(x, router_input=given * torch.tensor([[0.01], [7.0], [1e6]]))
    assert_close(scaled.hidden_states, output.hidden_states)
    assert_close(output.routing.details["pooling_weights"], given / given.sum(1, keepdim=True))
    (output.hidden_states * torch.randn(B, S, H)).sum().backward()
    assert given.grad.abs().min() > 0
    # Their length changes nothing.
    assert_close((given.grad * given).sum(1), torch.zeros(B, dtype=F64), rtol=0, atol=1e-12)


def test_given_weights_of_another_type() -> None:
    moe = make("given")
    x = torch.randn(B, S, H, dtype=F64)
    ones = torch.ones(B, S)
    expected = make_router("mean")(x).details["gate_input"]
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float32):
        routing = moe(x, router_input=ones.to(dtype)).routing
        assert_close(routing.details["gate_input"], expected, rtol=0, atol=1e-6)
    zeros = moe(x, router_input=0 * ones).routing
    assert (zeros.details["pooling_weights"] == 0).all()


@every_pooling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_what_there_is_to_look_at(pooling: str, dtype: torch.dtype) -> None:
    router = make_router(pooling).to(dtype)
    x = torch.randn(2, B, S, H, dtype=dtype)
    given = given_for(pooling, 2, B, S)
    given = None if given is None else given.to(dtype)
    output = router(x, given)
    wide = torch.promote_types(dtype, torch.float32)
    assert output.indices is None
    assert set(output.details) == {"pooling_weights", "gate_input"}
    assert output.details["pooling_weights"].dtype == wide
    assert output.details["gate_input"].dtype == dtype
    assert output.logits.shape == (2, B, S, E)
    assert output.logits.dtype == wide
    routing = MoE(H, INNER, E, K, router=router, dtype=dtype)(x, router_input=given).routing
    assert torch.equal(routing.details["gate_input"], output.details["gate_input"])
    assert not MoE(H, INNER, E, K)(torch.randn(S, H)).routing.details


@pytest.mark.parametrize("pooling", ["attention", "mean", "first"])
def test_router_input_replaces_x(pooling: str) -> None:
    width = 4
    router = make_router(pooling, Router(width, E, dtype=F64))
    moe = MoE(H, INNER, E, K, router=router, dtype=F64)
    x = torch.randn(B, S, H, dtype=F64)
    other = torch.randn(B, S, width, dtype=F64)
    mask = lengths_mask(5, 0, 8)
    weights, inputs = plain_pooling(router, other, None, mask)
    spoiled = other.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    routing = moe(x, router_input=spoiled, token_mask=mask).routing
    assert_close(routing.details["pooling_weights"], weights)
    assert_close(routing.details["gate_input"], inputs)
    routing.weights.square().sum().backward()
    assert spoiled.grad.isfinite().all()
    assert (spoiled.grad[~mask] == 0).all()


@every_pooling
def test_wraps_a_linear_layer(pooling: str) -> None:
    linear = nn.Linear(H, E, dtype=F64)
    moe = MoE(H, INNER, E, K, router=make_router(pooling, linear), dtype=F64)
    assert moe.router.num_experts == E
    x, given = torch.randn(B, S, H, dtype=F64), given_for(pooling, B, S)
    routing = moe(x, router_input=given).routing
    inputs = plain_pooling(moe.router, x, given, None)[1]
    assert_close(routing.logits.view(B, S, E)[:, -1], linear(inputs))
    moe.update(routing)
    moe.reset_parameters()


def test_the_query_is_0_at_first_which_is_the_mean() -> None:
    inner = Router(H, E, dtype=torch.bfloat16)
    router = SequenceRouter(inner)
    assert router.pooling == "attention"
    assert router.query.dtype == torch.bfloat16
    assert torch.equal(router.query, torch.zeros(H, dtype=torch.bfloat16))
    x, mask = torch.randn(B, S, H, dtype=torch.bfloat16), lengths_mask(5, 0, 8)
    mean = SequenceRouter(inner, pooling="mean")
    assert list(dict(mean.named_parameters())) == ["router.weight"]
    assert_close(router(x, token_mask=mask).logits, mean(x, token_mask=mask).logits)
    nn.init.normal_(router.query)
    before = inner.weight.clone()
    router.reset_parameters()
    assert (router.query == 0).all()
    assert not torch.equal(inner.weight, before)


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30])
def test_attention_scores_of_any_size(scale: float) -> None:
    router = make_router("attention", Router(H, E))
    nn.init.constant_(router.query, scale)
    x = torch.rand(B, S, H) + 1  # all scores have the sign of scale, those of padding are 0
    mask = lengths_mask(5, 1, 8)
    x = x.masked_fill(~mask.unsqueeze(-1), 0).requires_grad_()
    output = router(x, token_mask=mask)
    scores = (x.sum(dim=-1) * math.copysign(1, scale)).masked_fill(~mask, -torch.inf)
    weights = output.details["pooling_weights"]
    assert torch.equal(weights.argmax(dim=1), scores.argmax(dim=1))
    assert_close(weights.sum(dim=1), torch.ones(B))
    assert (weights[~mask] == 0).all()
    output.logits.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(router).values())


def test_usage_is_that_of_the_router_inside() -> None:
    inner = CosineRouter(H, E, track_usage=True, dtype=F64)
    moe = MoE(
        H,
        INNER,
        E,
        K,
        router=SequenceRouter(inner),
        balance=Balance(fraction_from="history"),
        dtype=F64,
    )
    assert moe.router.usage is inner.usage
    inner.usage.copy_(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0]))
    before = inner.usage.clone()
    routing = moe(torch.randn(B, S, H, dtype=F64)).routing
    probs = routing.logits.softmax(-1).mean(0)
    assert_close(routing.losses["load_balancing_loss"], E * (before * probs).sum())
    moe.update(routing)
    expected = 0.99 * before + 0.01 * routing.tokens_per_expert / (K * B * S)
    assert_close(inner.usage, expected)
    assert SequenceRouter(Router(H, E)).usage is None
    with pytest.raises(ValueError, match=r"MoE: router must keep usage for balance.fraction_from"):
        make("mean", balance=Balance(fraction_from="history"))


@every_pooling
def test_derivatives(pooling: str) -> None:
    x, given = torch.randn(2, 3, 3, dtype=F64), given_for(pooling, 2, 3)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    router = make_router(pooling, Router(3, 3, dtype=F64))
    assert gradcheck(router, (x, given, mask))
    kwargs = {"token_mask": mask, "router_input": given}
    assert gradcheck(MoE(3, 2, 3, 2, router=router, dtype=F64), x, kwargs=kwargs)


@every_pooling
def test_second_derivatives(pooling: str) -> None:
    router = make_router(pooling, Router(3, 3, dtype=F64))
    names = [name for name, _ in router.named_parameters()]
    mask = torch.tensor([[False, True, True], [True, True, False]])

    def function(x: Tensor, given: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        inputs = (x, given if pooling == "given" else None, mask)
        return torch.func.functional_call(router, named, inputs).logits

    given = given_for("given", 2, 3).requires_grad_(pooling == "given")
    x = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for p in router.parameters()]
    assert torch.autograd.gradgradcheck(function, (x, given, *leaves), fast_mode=True)


def test_gradients_reach_every_token_of_the_sequence_and_no_other() -> None:
    moe = make("attention", balance=Balance(weight=0.0))
    x = torch.randn(B, S, H, dtype=F64, requires_grad=True)
    moe(x).hidden_states[1, 2].square().sum().backward()
    norms = x.grad.norm(dim=-1)
    assert (norms[1] > 0).all()
    assert (norms[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("shape", "given_shape", "got"),
    [
        ((B, S, H), None, r"got None"),
        ((B, S, H), (B, S, 1), r"got shape \[3, 8, 1\]"),
    ],
)
def test_given_weights_must_be_there(
    shape: tuple[int, ...], given_shape: tuple[int, ...] | None, got: str
) -> None:
    given = None if given_shape is None else torch.rand(given_shape)
    message = r'SequenceRouter: router_input must be .* \[3, 8\] with pooling "given", ' + got
    with pytest.raises(RuntimeError, match=message):
        make("given")(torch.randn(shape, dtype=F64), router_input=given)


@every_pooling
def test_there_must_be_a_sequence(pooling: str) -> None:
    message = r"SequenceRouter: x must be \[..., length, hidden_size\], got shape \[6\]"
    with pytest.raises(RuntimeError, match=message):
        make(pooling)(torch.randn(H, dtype=F64), router_input=given_for(pooling))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"SequenceRouter: pooling must be one of .*, got \"max\""):
        SequenceRouter(Router(H, E), pooling="max")
    part = (
        r"SequenceRouter: router must be a module that scores each token alone, "
        r"such as Router or CosineRouter, got "
    )
    for router, name in (
        (SequenceRouter(Router(H, E)), "SequenceRouter"),
        (ExpertChoiceRouter(Router(H, E), K), "ExpertChoiceRouter"),
        (HashRouter(E), "HashRouter"),  # it reads ids, which cannot be pooled
        (torch.sin, "builtin_function_or_method"),
    ):
        with pytest.raises(TypeError, match=part + name):
            SequenceRouter(router)
    with pytest.raises(TypeError, match=r"SequenceRouter: router must have num_experts, got Tanh"):
        SequenceRouter(nn.Tanh())


@pytest.mark.parametrize("pooling", ["attention", "mean", "first"])
def test_what_is_pooled_instead_of_x_must_be_vectors(pooling: str) -> None:
    router = SequenceRouter(Router(H, E), pooling=pooling)
    message = r"router_input must be vectors \[2, 3, 'hidden_size'\], .* got shape \[2, 3\]"
    with pytest.raises(RuntimeError, match=message):
        router(torch.randn(2, 3, H), torch.rand(2, 3))


def test_a_router_without_parameters() -> None:
    class Sums(nn.Module):
        num_experts, hidden_size = E, H

        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(dim=-1)[:, :E]

    moe = MoE(H, INNER, E, K, router=SequenceRouter(Sums()))
    moe(torch.randn(B, S, H)).hidden_states.sum().backward()
    assert moe.router.query.grad.abs().max() > 0


def test_extra_repr() -> None:
    assert SequenceRouter(Router(H, E), pooling="first").extra_repr() == "pooling='first'"


@pytest.mark.parametrize("name", ["sparsemixer", "gumbel_straight_through"])
def test_estimators_that_draw_would_break_the_one_decision(name: str) -> None:
    message = (
        r"MoE: gate.estimator must not draw each token's experts with SequenceRouter, "
        r"which decides once for each sequence, got (SparseMixer|GumbelStraightThrough)"
    )
    with pytest.raises(ValueError, match=message):
        make("mean", gate=Gate(estimator=name))
