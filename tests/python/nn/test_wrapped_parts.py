"""Parts that torch has put another module around tell of themselves as they do without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchmoe.nn import (
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    ExpertCommunication,
    Experts,
    Gate,
    HashRouter,
    MoE,
    Router,
    SequenceRouter,
)

S, H, INNER, E, K = 6, 8, 5, 4, 2

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)

ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "noisy": lambda: Router(H, E, logit_noise=0.1, usage_scaling=True),
    "cosine": lambda: CosineRouter(H, E, track_usage=True),
    "hash": lambda: HashRouter(E, K),
    "sequence": lambda: SequenceRouter(Router(H, E, track_usage=True)),
    "expert_choice": lambda: ExpertChoiceRouter(Router(H, E), K),
}


def outcome(moe: MoE, router_input: Tensor | None) -> list[Tensor]:
    """What a step gives and leaves."""
    torch.manual_seed(1)
    y, aux_loss, routing = moe(torch.randn(2, S, H), router_input=router_input)
    moe.update(routing)
    return [y, aux_loss, routing.indices, *moe.state_dict().values()]


@every_wrapper
@pytest.mark.parametrize("name", ROUTERS)
def test_a_wrapped_router_routes_and_remembers_as_it_does_alone(
    wrap: Callable[[nn.Module], nn.Module], name: str
) -> None:
    token_ids = torch.arange(2 * S).view(2, S) if name == "hash" else None
    outcomes = []
    for around in (lambda module: module, wrap):
        torch.manual_seed(0)
        moe = MoE(H, INNER, E, K, router=ROUTERS[name]())
        moe.router = around(moe.router)
        outcomes.append(outcome(moe, token_ids))
    for alone, wrapped in zip(*outcomes, strict=True):
        assert torch.equal(alone, wrapped)


@every_wrapper
def test_what_a_wrapped_part_tells_is_asked(wrap: Callable[[nn.Module], nn.Module]) -> None:
    router = wrap(Router(H, E, track_usage=True))
    moe = MoE(H, INNER, E, K, capacity=Capacity(1, dynamic=True), router=router)
    moe.capacity = Capacity(2, dynamic=True)
    router, rerouting = wrap(HashRouter(E, K)), Capacity(1, overflow="next_best")
    with pytest.raises(ValueError, match=r"MoE: capacity.overflow must not lead tokens to experts"):
        MoE(H, INNER, E, K, capacity=rerouting, router=router)
    experts = wrap(ExpertCommunication(Experts(H, INNER, E), H, E))
    with pytest.raises(ValueError, match=r"MoE: gate.estimator must not need the output of each"):
        MoE(H, None, E, K, gate=Gate(estimator="default_vector"), experts=experts)
    with pytest.raises(ValueError, match=r"ExpertCommunication: experts must not mix"):
        ExpertCommunication(experts, H, E)
    with pytest.raises(TypeError, match=r"SequenceRouter: router must be a module that scores"):
        SequenceRouter(router)
