"""This package's layer under several settings."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from torchmoe.nn import (
    Balance,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    Gate,
    MoE,
    Router,
    SequenceRouter,
    WithAttachedLoss,
)

SIZES = (6, 5, 4, 2)
GROUPED = Gate("sigmoid", num_groups=4, top_groups=2)
BALANCED = Balance(0.01, fraction_from="sequence", selection_bias_rate=0.001)


class TwoOutputs(nn.Module):
    """A layer whose routing is not to be seen from outside."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the loss."""
        output = self.moe(x)
        return output.hidden_states, output.aux_loss


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "own": lambda: MoE(*SIZES),
    "own_top1": lambda: MoE(6, 5, 4, 1, gate=Gate(normalize="none")),
    "own_sigmoid": lambda: MoE(*SIZES, gate=Gate("sigmoid"), bias=True),
    "own_capacity": lambda: MoE(*SIZES, capacity=Capacity(0.75)),
    "own_next_best": lambda: MoE(*SIZES, capacity=Capacity(1, overflow="next_best")),
    "own_z_loss": lambda: MoE(*SIZES, balance=Balance(0.01, z_loss_weight=0.001)),
    "own_deepseek": lambda: MoE(
        6,
        5,
        8,
        2,
        gate=GROUPED,
        balance=BALANCED,
        shared_experts=nn.Linear(6, 6),
        routed_scaling_factor=2.5,
    ),
    "own_cosine": lambda: MoE(*SIZES, router=CosineRouter(6, 4)),
    "own_expert_choice": lambda: MoE(*SIZES, router=ExpertChoiceRouter(Router(6, 4), 2)),
    "own_sequence": lambda: MoE(*SIZES, router=SequenceRouter(Router(6, 4))),
    "own_straight_through": lambda: MoE(*SIZES, gate=Gate(estimator="straight_through")),
    "own_gumbel": lambda: MoE(*SIZES, gate=Gate(estimator="gumbel_straight_through")),
    "own_sparsemixer": lambda: MoE(*SIZES, gate=Gate(estimator="sparsemixer")),
    "own_attached": lambda: WithAttachedLoss(MoE(*SIZES)),
    "own_attached_gumbel": lambda: WithAttachedLoss(
        MoE(
            6,
            5,
            6,
            2,
            gate=Gate(estimator="gumbel_straight_through"),
            balance=Balance(0.02, fraction_from="sequence"),
            shared_experts=nn.Linear(6, 6),
            routed_scaling_factor=2.5,
        )
    ),
    "own_dense": lambda: MoE(
        *SIZES, gate=Gate(estimator="straight_through_dense"), capacity=Capacity(0.75)
    ),
    "own_wrapped": lambda: TwoOutputs(
        MoE(
            6,
            5,
            6,
            2,
            capacity=Capacity(1, overflow="next_best"),
            shared_experts=nn.Linear(6, 6),
            routed_scaling_factor=2.5,
        )
    ),
    "own_square": lambda: MoE(6, 5, 6, 2, router=CosineRouter(6, 6, projection_size=3)),
    "own_every_expert": lambda: TwoOutputs(MoE(6, 5, 3, 3, capacity=Capacity(0.75))),
}
