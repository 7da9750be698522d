"""A gradient estimator of your own: written, checked, compared, trained.

Which experts a token gets is an integer and has no gradient. An estimator says what the router
learns from instead. The one below lets it also hear from the runner-up, the best expert that the
token did not get: the output stays as it is, and the router learns whether that expert would have
helped. This costs one more expert per token.

Shapes: T tokens, H hidden size, E experts, K = top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from torchmoe import ops
from torchmoe.nn import Estimator, Gate, MoE
from torchmoe.testing import check_surrogate, compare_estimators

HIDDEN, EXPERTS, TOP_K = 16, 8, 2
STEPS, TOKENS, SEEDS = 200, 256, 3


class RunnerUp(Estimator):
    """Straight-through for the chosen experts, and the same for the best one of the others.

        forward   w_j as the gate says, of the softmax of logits / temperature
        backward  dL/dp_i = <dL/dy, E_i(x)> for the chosen experts and the runner-up, else 0

    Args:
        temperature: of the softmax.
        noise: standard deviation of what is added to the logits in training before they rank.
    """

    gate_estimator = "straight_through"  # what the inherited weigh asks ops.gate_weights for
    draws = True  # a layer asks this where the choices of a sequence must agree
    settings = ("temperature", "noise")  # what repr shows

    def __init__(self, temperature: float = 1.0, noise: float = 0.1) -> None:
        super().__init__()
        self.temperature, self.noise = temperature, noise

    def select(self, logits: Tensor, **options: Tensor | None) -> Tensor:
        """Chooses: [T, E] to ids [T, K]. Drawn from torch's generator, as checkpointing needs."""
        if self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return super().select(logits, **options)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Weighs: logits [T, E] and ids [T, K] to weights [T, K]."""
        return super().weigh(logits / self.temperature, indices)

    def combine(
        self,
        x: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes y [T, H]: the runner-up gets one more slot, of weight 0, which changes nothing.

        But that weight has a gradient, <dL/dy, E_i(x)>. x and the expert learn nothing from it.
        """
        runner_up = self.runner_up(logits, indices, token_mask)  # [T, 1]
        p = self.probs(logits / self.temperature).gather(1, runner_up.clamp(min=0))  # [T, 1]
        columns = torch.cat([weights, p - p.detach()], dim=1)  # [T, K + 1]
        return experts(x, torch.cat([indices, runner_up], dim=1), columns)

    def runner_up(self, logits: Tensor, indices: Tensor, token_mask: Tensor | None) -> Tensor:
        """The best expert that does not serve the token, [T, 1]; -1 = none, or a masked token."""
        taken = self.named(indices)
        others = logits.detach().masked_fill(taken, -torch.inf)
        best = ops.select_experts(others, 1, token_mask=token_mask)
        return best.masked_fill(taken.all(1, keepdim=True), -1)

    def named(self, indices: Tensor) -> Tensor:
        """Which experts the ids [T, K] name, bool [T, E]; -1 names none."""
        return functional.one_hot(indices + 1, self.num_experts + 1)[:, :, 1:].sum(1) > 0

    def surrogate(self, logits: Tensor, selected: Tensor, indices: Tensor) -> Tensor:
        """Declares the weights [T, E] whose derivative the router gets, for check_surrogate."""
        heard = torch.cat([indices, self.runner_up(logits, indices, None)], dim=1)
        return self.probs(logits / self.temperature) * self.named(heard)


def train(estimator: str | Estimator, seed: int) -> float:
    """The final loss on tokens that each of eight regions maps differently."""
    torch.manual_seed(seed)
    moe = MoE(HIDDEN, HIDDEN, EXPERTS, TOP_K, gate=Gate(estimator=estimator))
    data = torch.Generator().manual_seed(seed)  # of its own: an estimator may draw from the default
    centres = torch.randn(EXPERTS, HIDDEN, generator=data)
    maps = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=data) / HIDDEN**0.5
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(TOKENS, HIDDEN, generator=data)
        wanted = torch.einsum("th,thg->tg", x, maps[(x @ centres.T).argmax(1)])
        output = moe(x)
        loss = (output.hidden_states - wanted).square().mean()
        optimizer.zero_grad()
        (loss + output.aux_loss).backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-20:]).mean().item()


def main() -> None:
    """Checks, compares and trains."""
    torch.set_num_threads(1)  # more are slower at this size
    # Each raises where the gradient is not that of the surrogate, or the output is another.
    check_surrogate(RunnerUp())
    check_surrogate(RunnerUp(temperature=2.0), top_k=1, normalize="topk", masked_tokens=2)
    check_surrogate(RunnerUp(), top_k=EXPERTS, num_experts=EXPERTS, normalize="none")
    print("check_surrogate: the router learns from what RunnerUp declares\n")

    torch.manual_seed(0)
    moe = MoE(HIDDEN, HIDDEN, EXPERTS, TOP_K)
    batches = [torch.randn(TOKENS, HIDDEN) for _ in range(4)]
    names: list[str | Estimator] = [
        "exact",
        "straight_through",
        RunnerUp(),
        "straight_through_dense",
    ]
    print("the router's gradient compared with that of the mixture of all experts:")
    print(compare_estimators(moe, batches, lambda y, x: (y - x).square().mean(), estimators=names))

    # A gradient closer to the dense mixture's is not better training by itself: see exact here.
    print(f"\nloss after {STEPS} steps, seeds 0 to {SEEDS - 1}:")
    for name in ("exact", "straight_through", "RunnerUp"):
        # An estimator belongs to one layer, so each layer gets an instance of its own.
        losses = [train(RunnerUp() if name == "RunnerUp" else name, s) for s in range(SEEDS)]
        print(f"{name:16}  {'  '.join(f'{loss:.3f}' for loss in losses)}")


if __name__ == "__main__":
    main()
