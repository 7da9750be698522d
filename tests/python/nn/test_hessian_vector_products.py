"""The second derivative of a layer with every part equals a finite difference of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced import TERMS, largest_logit
from built_in import ESTIMATORS, make_router, without
from communicating_experts import listed, stacked, talking
from second_order import (
    Values,
    assert_same_products,
    check_products,
    difference_of_gradients,
    forward_over_reverse,
    layer_loss,
    layer_values,
    reverse_over_reverse,
)
from torchmoe import ops
from torchmoe.nn import (
    Assistance,
    Balance,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    Gate,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
    SparseMixer,
)

B, S, H, INNER, E, K = 2, 5, 6, 4, 5, 2
F64 = torch.float64
RING = (1, 2, 3, 4, 0)
KIND = {"dtype": F64}
# What does not move the logits where the router reads something else than x.
BEYOND_THE_ROUTER = ("x", "experts.", "shared_experts.")


def make(top_k: int = K, **options: Any) -> MoE:
    """A layer in a state that is not the first one, its losses as large as its output."""
    given = {"bias": True, "balance": Balance(1.0), **KIND} | options
    moe = MoE(H, None if "experts" in given else INNER, E, top_k, **given)
    moe.update(moe(tokens()).routing)
    return moe


def tokens() -> Tensor:
    return torch.randn(B, S, H, dtype=F64)


def check(moe: MoE, **call: Tensor | None) -> None:
    """Reverse over reverse and forward over reverse, in a direction of every value at once."""
    found = check_products(layer_loss(moe, **call), lambda: layer_values(moe, x=tokens()))
    for name, value in found.items():
        assert value.abs().max() > 1e-4, f"{name} has no part in it"


# ---- routers


@pytest.mark.parametrize("pooling", ["attention", "mean", "first"])
@pytest.mark.parametrize("inner", [Router, CosineRouter])
def test_sequence_routers(pooling: str, inner: type[nn.Module]) -> None:
    router = SequenceRouter(inner(H, E, **KIND), pooling=pooling)
    if router.query is not None:
        nn.init.normal_(router.query)
    check(make(router=router))


def test_a_sequence_router_by_given_weights() -> None:
    """Which have second derivatives, too."""
    moe = MoE(H, INNER, E, K, router=SequenceRouter(Router(H, E, **KIND), pooling="given"), **KIND)
    given = torch.rand(B, S, dtype=F64) + 0.1
    check_products(layer_loss(moe), lambda: layer_values(moe, x=tokens(), router_input=given))


@pytest.mark.parametrize("among", ["batch", "sequence"])
@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_expert_choice(among: str, score_function: str) -> None:
    inner = Router(H, E, bias=True, **KIND)
    router = ExpertChoiceRouter(inner, K, among=among, score_function=score_function)
    check(make(router=router, gate=Gate(score_function)))


def test_a_hash_router() -> None:
    """Whose logits are constants."""
    moe = MoE(H, INNER, E, K, router=HashRouter(E, K), bias=True, **KIND)
    check(moe, router_input=torch.randint(1000, (B, S)))


NAMED = [Router, CosineRouter, SequenceRouter, ExpertChoiceRouter, HashRouter]
OF_EACH_TOKEN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Router(H, E, bias=True, **KIND),
    "noisy": lambda: Router(H, E, logit_noise=0.5, input_jitter=0.2, **KIND),
    "cosine": lambda: CosineRouter(H, E, **KIND),
    "torchs_own": lambda: nn.Linear(H, E, **KIND),
    "two_layers": lambda: nn.Sequential(
        nn.Linear(H, 7, **KIND), nn.Tanh(), nn.Linear(7, E, **KIND)
    ),
} | {
    name: lambda kind=kind: make_router(kind, H, E, K, **KIND)
    for name, kind in without(NAMED).items()
}


@pytest.mark.parametrize("name", OF_EACH_TOKEN)
def test_routers_of_each_token(name: str) -> None:
    check(make(router=OF_EACH_TOKEN[name]()))


def test_what_the_router_reads_instead() -> None:
    moe = make()
    check_products(layer_loss(moe), lambda: layer_values(moe, x=tokens(), router_input=tokens()))


# ---- gates, capacity, balance, experts


@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
@pytest.mark.parametrize("normalize", ops.NORMALIZES)
@pytest.mark.parametrize("top_k", [1, K, E])
def test_every_gate(score_function: str, normalize: str, top_k: int) -> None:
    moe = MoE(H, INNER, E, top_k, gate=Gate(score_function, normalize), bias=True, **KIND)
    if normalize == "uniform" or (normalize == "topk" and top_k == 1):
        with pytest.raises(ValueError, match="gate_weights: estimator"):
            moe(tokens())
        return
    moe.balance = Balance(1.0)
    check(moe)


@pytest.mark.parametrize("score_function", ops.SCORE_FUNCTIONS)
def test_groups_of_experts_and_a_selection_bias(score_function: str) -> None:
    balance = Balance(1.0, selection_bias_rate=0.1)
    gate = Gate(score_function, num_groups=3, top_groups=2)
    moe = MoE(H, INNER, 6, K, gate=gate, balance=balance, **KIND)
    moe.update(moe(tokens()).routing)
    check(moe)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "token", "normalize": "after_drop"},
        {"priority": "weight"},
        {"priority": "random", "overflow": "next_best"},
        {"overflow": "next_best"},
        {"overflow": "backup", "backup": RING},
        {"dynamic": True, "minimum": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "choice",
)
def test_capacity(options: dict[str, Any]) -> None:
    router = Router(H, E, track_usage=True, **KIND)
    moe = make(capacity=Capacity(0.8, **options), router=router)
    routing = moe(tokens()).routing
    assert (routing.indices != routing.selected).any()
    check(moe)


@pytest.mark.parametrize("fraction_from", ["batch", "sequence", "global_batch", "history"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_loss(fraction_from: str, masked: bool) -> None:
    losses = [*((name, 0.5) for name in TERMS if name != "router_z_loss"), (largest_logit, 0.5)]
    balance = Balance(1.0, z_loss_weight=0.5, losses=losses, fraction_from=fraction_from)
    router = Router(H, E, logit_noise=0.5, track_usage=True, **KIND)
    mask = torch.arange(S) < torch.tensor([[S], [2]]) if masked else None
    check(make(balance=balance, router=router), token_mask=mask)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(activation: str, bias: bool) -> None:
    check(make(activation=activation, bias=bias))


def test_shared_experts_and_a_scale() -> None:
    shared = nn.Sequential(nn.Linear(H, 3, **KIND), nn.Tanh(), nn.Linear(3, H, **KIND))
    check(make(shared_experts=shared, routed_scaling_factor=2.5))


def test_assistance() -> None:
    assistance = Assistance(RING)
    moe = make(assistance=assistance, router=Router(H, E, track_usage=True, **KIND))
    assistance.assisted.fill_(1)
    assert (moe(tokens()).routing.indices[:, -1] >= 0).any()
    check(moe)


@pytest.mark.parametrize("experts", [stacked, listed], ids=["stacked", "list"])
def test_experts_that_talk(experts: Any) -> None:
    check(make(experts=talking(experts())))


def test_a_list_of_experts() -> None:
    check(make(experts=listed()))


# ---- estimators


@pytest.mark.parametrize("name", ["exact", "default_vector"])
@pytest.mark.parametrize("training", [True, False])
def test_estimators_without_a_surrogate(name: str, training: bool) -> None:
    check(make(gate=Gate(estimator=name), capacity=Capacity(0.9)).train(training))


def test_sparsemixer_in_evaluation() -> None:
    """Where nothing is drawn, and its gradient is that of the weights."""
    moe = make(gate=Gate(estimator=SparseMixer(jitter=0.5))).eval()
    routing = moe(tokens()).routing
    assert (routing.weights < 0.99).any()
    check(moe)


# Where more than one expert competes in sparsemixer, so that its weights have a derivative.
SETTINGS = {"sparsemixer": {"jitter": 0.5}}
SURROGATES = [name for name in ESTIMATORS if name not in ("exact", "default_vector")]


def surrogate_layer(name: str, **options: Any) -> MoE:
    gate = Gate(estimator=ESTIMATORS[name](**SETTINGS.get(name, {})))
    return make(gate=gate, shared_experts=nn.Linear(H, H, **KIND), **options)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("experts", [None, listed], ids=["stacked", "list"])
def test_a_declared_gradient_by_what_moves_no_logit(name: str, experts: Any) -> None:
    """The layer's gradient is not the derivative of its output, and has a derivative of its own.

    Where the logits stay, the numbers of the output move as its derivative says.
    """
    moe = surrogate_layer(name, **({"experts": experts()} if experts else {}))

    def draw() -> Values:
        return layer_values(moe, x=tokens(), router_input=tokens())

    moved = [value for value in draw() if value.startswith(BEYOND_THE_ROUTER)]
    found = check_products(layer_loss(moe), draw, moved=moved)
    assert found["router.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("name", SURROGATES)
def test_a_declared_gradient_by_the_routers_weight(name: str) -> None:
    """Of a loss that is linear in the output, so that what arrives at the weights stays as it is.

    The router's gradient is then the derivative of its surrogate, with a symmetric Hessian.
    """
    moe = surrogate_layer(name)
    function = layer_loss(moe, linear=True)
    values, directions, expected = difference_of_gradients(
        function, lambda: layer_values(moe, x=tokens()), ["router.weight"]
    )
    assert expected["router.weight"].abs().max() > 1e-3
    for product in (reverse_over_reverse, forward_over_reverse):
        found = product(function, values, directions)
        assert_same_products(found, expected, ["router.weight"])


@pytest.mark.parametrize("kind", [Router, CosineRouter])
def test_a_gradient_scaled_by_usage(kind: type[nn.Module]) -> None:
    """By everything but what is scaled, in whose own directions it is no derivative."""
    moe = make(router=kind(H, E, usage_scaling=True, **KIND))
    moe.router.usage.copy_(torch.rand(E))
    scaled = "router.weight" if kind is Router else "router.embeddings"
    moved = [name for name in layer_values(moe, x=tokens()) if name != scaled]
    check_products(layer_loss(moe), lambda: layer_values(moe, x=tokens()), moved=moved)
