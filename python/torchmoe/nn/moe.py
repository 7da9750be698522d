"""The mixture-of-experts layer.

Shapes: T tokens (the input's leading dimensions, flattened), H hidden size, E experts, K = top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe.nn import _reduce
from torchmoe.nn._checks import Level, check_at_least, check_integer, check_not_negative
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.estimators.estimator import ExpertFunction
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.router import Router
from torchmoe.nn.routing import MoEOutput, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DEFAULT_GATE = Gate()


class MoE(nn.Module):
    """Routes each token to top_k of num_experts feed-forward networks and adds up their outputs.

    A forward pass changes no buffer and keeps nothing. What is to be remembered is in the returned
    `routing`, and `update`, called once per optimizer step, takes it from there:

        output = moe(x)
        loss = task_loss(output.hidden_states) + output.aux_loss
        loss.backward()
        optimizer.step()
        moe.update(output.routing)

    Args:
        hidden_size: H.
        intermediate_size: the experts' inner width; may be None when `experts` are given.
        num_experts: E.
        top_k: experts per token, in [1, E].
        activation: of the experts, see `Experts`.
        bias: gives the experts' projections a bias; the router's is Router(bias=True).
        gate: how weights are formed and their gradient estimated.
        capacity: limits the slots of an expert; None keeps every slot.
        balance_weight: coefficient of load_balancing_loss in aux_loss.
        z_loss_weight: coefficient of router_z_loss in aux_loss; at 0 it is not computed.
        router: replaces the router: a module from x [T, H] to logits [T, E].
        experts: replaces the experts: anything called as experts(x, indices, weights) -> y [T, H].
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        balance_weight: see above; may be changed at any time, as z_loss_weight.
        z_loss_weight: see above.
        router: the router.
        estimator: the gradient estimator, from gate.
        experts: the experts.
        selection_bias: [E] buffer or None: when set, experts are ranked by score_function(logits) +
            selection_bias. It never enters the weights.

    Raises:
        TypeError: a size is not an int, or gate or capacity has another type.
        ValueError: a value is out of range, or a replaced part has another number of experts.
    """

    selection_bias: Tensor | None
    z_loss_weight = Level()
    _z_loss_weight: float | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate: Gate = _DEFAULT_GATE,
        capacity: Capacity | None = None,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        router: nn.Module | None = None,
        experts: ExpertFunction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("MoE", "hidden_size", hidden_size, 1)
        check_at_least("MoE", "num_experts", num_experts, 1)
        check_integer("MoE", "top_k", top_k)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoE: top_k must be in [1, {num_experts}], got {top_k}")
        check_not_negative("MoE", "balance_weight", balance_weight)
        if not isinstance(gate, Gate):
            raise TypeError(f"MoE: gate must be a Gate, got {gate!r}")
        if capacity is not None and not isinstance(capacity, Capacity):
            raise TypeError(f"MoE: capacity must be a Capacity or None, got {capacity!r}")
        _check_part("router", router, num_experts=num_experts, hidden_size=hidden_size)
        _check_part("experts", experts, num_experts=num_experts, hidden_size=hidden_size)

        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity = capacity
        self.balance_weight = balance_weight
        self.z_loss_weight = z_loss_weight

        if router is None:
            router = Router(hidden_size, num_experts, device=device, dtype=dtype)
        if experts is None:
            if intermediate_size is None:
                raise ValueError("MoE: intermediate_size must be given without experts, got None")
            experts = Experts(
                hidden_size,
                intermediate_size,
                num_experts,
                activation=activation,
                bias=bias,
                device=device,
                dtype=dtype,
            )
        self.router = router
        self.estimator = build_estimator(gate.estimator)
        self.estimator.bind(
            top_k=top_k,
            num_experts=num_experts,
            hidden_size=hidden_size,
            score_function=gate.score_function,
            normalize=gate.normalize,
            device=device,
            dtype=dtype,
        )
        self.experts = experts
        self.register_buffer("selection_bias", None)

    def reset_parameters(self) -> None:
        """Gives the parameters and buffers of every part their first values again."""
        for part in (self.router, self.estimator, self.experts):
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None) -> MoEOutput:
        """Decide, weigh, dispatch and compute, account.

        Args:
            x: [..., H] in the dtype of the parameters.
            token_mask: x's leading dimensions, bool, True = the token counts. A masked token gets y
                = 0, no gradient, and no place in counts, capacity and losses; what x holds there,
                NaN included, does not matter.

        Returns:
            hidden_states in x's shape, aux_loss = balance_weight * load_balancing_loss +
            z_loss_weight * router_z_loss, and the routing.

        Raises:
            RuntimeError: a shape or dtype does not fit.
            ValueError: the gate's exact gradient is zero everywhere (top_k = 1 with normalize
                "topk", or normalize "uniform").
        """
        tokens, mask = self._flatten(x, token_mask)  # [T, H], [T]
        num_tokens = tokens.shape[0] if mask is None else mask.sum()

        # 1. Logits: one per token and expert.
        logits = self._logits(tokens)  # [T, E]

        # 2. Decide which experts, and what the full ones drop: integers only.
        selected = self.estimator.select(
            logits, selection_bias=self.selection_bias, token_mask=mask
        )  # [T, K]
        indices = self._limit(selected, num_tokens)  # [T, K]

        # 3. Weigh: from the unbiased logits, and before slots are dropped unless asked otherwise,
        # which concerns the normalisation alone.
        after_drop = (
            self.capacity is not None
            and self.capacity.normalize == "after_drop"
            and self.estimator.normalize != "none"
        )
        weights = self.estimator.weigh(logits, indices if after_drop else selected)  # [T, K]

        # 4. Dispatch and compute.
        combined = self.estimator.combine(
            tokens, logits, indices, weights, self.experts, token_mask=mask
        )
        y, statistics = combined if isinstance(combined, tuple) else (combined, None)  # [T, H]

        # 5. Account: counts, the losses, and everything above for whoever wants to look.
        tokens_per_expert = self._count(selected)  # [E]
        kept_per_expert = tokens_per_expert if indices is selected else self._count(indices)
        losses = self._losses(logits, tokens_per_expert, num_tokens, mask)
        aux_loss = self.balance_weight * losses["load_balancing_loss"]
        if self._z_loss_weight is not None:
            aux_loss = aux_loss + self._z_loss_weight * losses["router_z_loss"]

        routing = Routing(
            logits=logits,
            weights=weights,
            selected=selected,
            indices=indices,
            token_mask=mask,
            tokens_per_expert=tokens_per_expert,
            kept_per_expert=kept_per_expert,
            losses=losses,
            statistics=statistics,
        )
        return MoEOutput(y.reshape(x.shape), aux_loss, routing)

    @torch.no_grad()
    def update(
        self, routing: Routing | Sequence[Routing], *, group: ProcessGroup | None = None
    ) -> None:
        """Moves the running averages by one step: the router's usage and the estimator's own state.

        Call it once per optimizer step, with the routing of that step or with those of all its
        micro-batches, whose counts are summed. When torch.distributed is initialised the counts are
        summed over the processes too, so every process must call.

        Args:
            routing: one, or a list of them.
            group: the processes that hold this layer; None is all.

        Raises:
            TypeError: an item is not a Routing.
            ValueError: the list is empty, or only some hold the estimator's statistics.
        """
        routings = [routing] if isinstance(routing, Routing) else list(routing)
        for item in routings:
            if not isinstance(item, Routing):
                raise TypeError(
                    "MoE: routing must be a Routing, such as moe(x).routing, or a list of them, "
                    f"got {type(item).__name__}"
                )
        if not routings:
            raise ValueError("MoE: routing must hold at least one Routing, got an empty list")
        if isinstance(self.router, Router) and self.router.usage is not None:
            counts = [(r.tokens_per_expert, _num_slots(r)) for r in routings]
            self.router.update(*_reduce.total(counts, group))
        self.estimator.update(_reduce.total([r.statistics for r in routings], group))

    def extra_repr(self) -> str:
        """The settings that no part of the layer shows."""
        text = f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
        if self.capacity is not None:
            text += f", capacity={self.capacity}"
        if not isinstance(self.experts, nn.Module):
            text += f", experts={self.experts!r}"
        return f"{text}, balance_weight={self.balance_weight}, z_loss_weight={self.z_loss_weight}"

    def _flatten(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise RuntimeError(
                f"MoE: x must be [..., hidden_size] = [..., {self.hidden_size}], "
                f"got shape {list(x.shape)}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        if token_mask is None:
            return tokens, None
        if token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]:
            raise RuntimeError(
                f"MoE: token_mask must be bool of shape {list(x.shape[:-1])}, "
                f"got {token_mask.dtype} of shape {list(token_mask.shape)}"
            )
        mask = token_mask.reshape(-1)
        # Attention leaves NaN at positions that see nothing; 0 * NaN would carry it into the
        # router's gradient.
        return tokens.masked_fill(~mask.unsqueeze(-1), 0), mask

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = cast(Tensor, self.router(tokens))
        if logits.shape != (tokens.shape[0], self.num_experts):
            raise RuntimeError(
                "MoE: router must return [num_tokens, num_experts] = "
                f"[{tokens.shape[0]}, {self.num_experts}], got shape {list(logits.shape)}"
            )
        # A router of the user's own may return a 16-bit type, under autocast at the latest.
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _limit(self, selected: Tensor, num_tokens: int | Tensor) -> Tensor:
        if self.capacity is None:
            return selected
        slots = self.capacity.slots(
            num_tokens, self.num_experts, self.top_k, training=self.training
        )
        return ops.limit_capacity(
            selected,
            slots.expand(self.num_experts) if isinstance(slots, Tensor) else slots,
            order=self.capacity.order,
            overflow=self.capacity.overflow,
            num_experts=self.num_experts,
        )

    def _count(self, indices: Tensor) -> Tensor:
        return ops.dispatch_plan(indices, self.num_experts).expert_offsets.diff()

    def _losses(
        self,
        logits: Tensor,
        tokens_per_expert: Tensor,
        num_tokens: int | Tensor,
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        counts = tokens_per_expert.to(logits.dtype)
        # With no counted token the loss is 0 whatever the fraction, as long as that is a number.
        slots = _at_least_one(self.top_k * num_tokens)
        losses = {
            "load_balancing_loss": ops.load_balancing_loss(
                logits,
                counts / slots,
                score_function=self.estimator.score_function,
                token_mask=mask,
            )
        }
        if self._z_loss_weight is not None:
            losses["router_z_loss"] = ops.router_z_loss(logits, token_mask=mask)
        return losses


def _at_least_one(count: int | Tensor) -> int | Tensor:
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    at_least_one: int = torch.sym_max(count, 1)  # type: ignore[no-untyped-call]
    return at_least_one


def _num_slots(routing: Routing) -> Tensor:
    """K times the number of counted tokens, a scalar on the routing's device."""
    top_k = routing.indices.shape[1]
    if routing.token_mask is not None:
        return top_k * routing.token_mask.sum()
    return routing.tokens_per_expert.new_tensor(routing.indices.numel())


def _check_part(argument: str, part: object, **sizes: int) -> None:
    """Raises ValueError if a replaced part says that it was made for other sizes."""
    for name, expected in sizes.items():
        actual = getattr(part, name, expected)
        if actual != expected:
            raise ValueError(f"MoE: {argument} must have {name} {expected}, got {actual}")
