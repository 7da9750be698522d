"""The mixture-of-experts layer.

Shapes: T tokens (the input's leading dimensions, flattened), H hidden size, E experts, K = top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from torchmoe._checks import (
    Fixed,
    Level,
    Setting,
    check_among,
    check_at_least,
    check_device,
    check_dtype,
    check_flag,
    check_process_group,
)
from torchmoe._wide import wide_dtype
from torchmoe.nn import _compatibility, _reduce
from torchmoe.nn._accounting import account
from torchmoe.nn._buffers import Remembering
from torchmoe.nn._computation import compute
from torchmoe.nn._decision import decide, repeat, weigh
from torchmoe.nn._first_values import reset, reset_all
from torchmoe.nn._reminder import UpdateReminder
from torchmoe.nn._table import Table
from torchmoe.nn._tokens import flatten
from torchmoe.nn.assistance import Assistance
from torchmoe.nn.balance import Balance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.declarations import declared_by_router
from torchmoe.nn.estimators.estimator import ExpertFunction
from torchmoe.nn.estimators.registry import bound_estimator
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.routers._usage import UsageTracking, usage_of
from torchmoe.nn.routers.context_router import route
from torchmoe.nn.routers.router import Router
from torchmoe.nn.routing import Decision, MoEOutput, Routing, routings_of
from torchmoe.nn.routing_cache import RoutingCache
from torchmoe.selection_bias import update_selection_bias

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GATE, _BALANCE = Gate(), Balance()


class MoE(Remembering):
    """Routes each token to top_k of num_experts feed-forward networks and adds up their outputs.

    A forward pass changes no buffer and stores nothing. The returned `routing` has everything that
    `update` needs, which is called once per optimizer step:

        output = moe(x)
        loss = task_loss(output.hidden_states) + output.aux_loss
        loss.backward()
        optimizer.step()
        moe.update(output.routing)

    Settings are replaced as whole records, and are checked as when the layer was built:

        moe.balance = dataclasses.replace(moe.balance, weight=0.001)
        moe.capacity = Capacity(1.25)

    torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=True) turns the result into a plain
    tuple: hidden_states and aux_loss train the layer as usual, and nothing in routing carries a
    gradient. With use_reentrant=False the result is the same as without checkpointing.

    Args:
        hidden_size: H.
        intermediate_size: the experts' inner width; may be None when `experts` are given.
        num_experts: E.
        top_k: experts per token, in [1, E].
        activation: of the experts, see `Experts`.
        bias: gives the experts' projections a bias; the router's is Router(bias=True).
        gate: how the weights are formed and how their gradient is estimated.
        capacity: limits the slots of an expert; None keeps every slot.
        balance: the terms of aux_loss and the selection bias.
        assistance: gives experts under sustained load a backup in one extra slot. An instance
            belongs to one layer.
        shared_experts: a module [T, H] -> [T, H] whose output is added for every token.
        routed_scaling_factor: multiplies the routed experts' output, not the shared ones'.
        router: replaces the router: a module from gate inputs [T, G] to logits [T, E], such as
            `CosineRouter` and `HashRouter`, or a `ContextRouter`, such as `SequenceRouter` and
            `ExpertChoiceRouter`.
        experts: replaces the experts: anything called as experts(x, indices, weights) -> y [T, H].
        cache: gives tokens or sequences that resemble earlier ones the experts of those. An
            instance belongs to one layer.
        process_group: the processes of balance.fraction_from "global_batch" and of `update`; None
            is all processes. It cannot be pickled: after unpickling, set it again before use.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        hidden_size: H; fixed, like num_experts and top_k.
        capacity: see above; may be replaced at any time, like balance, routed_scaling_factor and
            process_group.
        estimator: the gradient estimator, from gate; a submodule, like router, assistance, experts
            and shared_experts.
        cache: see above; may be replaced at any time, or set to None.
        selection_bias: [E] buffer, float32 or wider, or None: if set, experts are ranked by
            score_function(logits) + selection_bias. It does not affect the weights.

    Raises:
        TypeError: a size is not an int, or a part has another type.
        ValueError: a value is out of range or conflicts with another, or a replaced part has
            another number of experts.
    """

    wide_buffers = ("selection_bias",)
    selection_bias: Tensor | None
    assistance: Assistance | None
    shared_experts: nn.Module | None
    hidden_size = Fixed[int]()
    num_experts = Fixed[int]()
    top_k = Fixed[int](of="estimator")
    balance = Setting[Balance]()
    capacity = Setting[Capacity | None]()
    cache = Setting["RoutingCache | None"]()
    routed_scaling_factor = Level(neutral=1.0)
    _routed_scaling_factor: float | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate: Gate = _GATE,
        capacity: Capacity | None = None,
        balance: Balance = _BALANCE,
        assistance: Assistance | None = None,
        shared_experts: nn.Module | None = None,
        routed_scaling_factor: float = 1.0,
        router: nn.Module | None = None,
        experts: ExpertFunction | None = None,
        cache: RoutingCache | None = None,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("MoE", "hidden_size", hidden_size, 1)
        check_at_least("MoE", "num_experts", num_experts, 1)
        check_among("MoE", "top_k", top_k, num_experts)
        check_flag("MoE", "bias", bias)
        check_device("MoE", device)
        check_dtype("MoE", dtype)
        _compatibility.check_given(
            gate, capacity, balance, assistance, shared_experts, router, experts, cache
        )
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.routed_scaling_factor = routed_scaling_factor
        self.process_group = process_group
        if router is None:
            reads = bool(_compatibility.usage_readers(balance, capacity, assistance))
            router = Router(hidden_size, num_experts, track_usage=reads, device=device, dtype=dtype)
        if experts is None:
            if intermediate_size is None:
                raise ValueError("MoE: intermediate_size must be given without experts, got None")
            sizes = hidden_size, intermediate_size, num_experts
            experts = Experts(*sizes, activation=activation, bias=bias, device=device, dtype=dtype)
        _compatibility.check_sizes(self, gate, top_k, router, experts, assistance)
        self.router = router
        self.estimator = bound_estimator(gate, self, top_k, device, dtype)
        if assistance is not None:
            least = _compatibility.least_experts(declared_by_router(router), self.estimator)
            assistance.bind(least).to(device)
        self.register_module("assistance", assistance)
        self.experts = experts
        self.register_module("shared_experts", shared_experts)
        selection_bias = None
        if balance.selection_bias_rate > 0:
            selection_bias = torch.zeros(num_experts, device=device, dtype=wide_dtype(dtype))
        self.register_buffer("selection_bias", selection_bias)
        self._reminder = UpdateReminder()
        self._balance, self._capacity = balance, capacity
        self._cache: RoutingCache | None = None
        self._take(device, cache=cache)

    @property
    def process_group(self) -> ProcessGroup | None:
        """Copies of the layer share it; one that was pickled must be given its own."""
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        check_process_group("MoE", "process_group", group)
        self._process_group = _reduce.SharedGroup(group)

    def _take(self, device: torch.device | str | None = None, **settings: Any) -> None:  # noqa: ANN401
        """Takes settings that go with the layer's parts, else none of them."""
        balance = settings.get("balance", self._balance)
        capacity = settings.get("capacity", self._capacity)
        cache = settings.get("cache", self._cache)
        parts = _compatibility.Parts.of(self, balance, capacity, cache)
        _compatibility.check_pairs(parts)
        if cache is not None:
            cache.bind(self)
        self._balance, self._capacity, self._cache = balance, capacity, cache
        self._backup = Table(parts.backup, device) if parts.backup else None
        self._reminder.readers = parts.update_readers

    def reset_parameters(self) -> None:
        """Gives the parameters and buffers of every part their first values again."""
        for part in (self.router, self.estimator, self.assistance, self.experts):
            reset(part)
        if self.shared_experts is not None:
            reset_all(self.shared_experts)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)
        if self.cache is not None:
            self.cache.clear()

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        earlier_counts: Tensor | None = None,
        router_input: Tensor | None = None,
        decision: Decision | None = None,
    ) -> MoEOutput:
        """Decide, weigh, dispatch and compute, account.

        Args:
            x: [..., H] in the dtype of the parameters.
            token_mask: x's leading dimensions, bool, True = the token counts. A masked token gets y
                = 0 and no gradient, and does not enter counts, capacity and losses. The values of x
                there are ignored, NaN included.
            earlier_counts: [E] integers, the counts of earlier micro-batches of the same optimizer
                step in this process: the sum of their routings' tokens_per_expert (with
                fraction_choices "first", of their first choices). They are added to this call's
                counts before the fractions of load_balancing_loss are formed. For fraction_from
                "batch" and "global_batch" only.
            router_input: x's leading dimensions and any others: what a router that looks at each
                token alone reads instead of x, such as token ids for `HashRouter` or other vectors
                [..., G]; a `ContextRouter` documents what it takes. Floating-point values of masked
                tokens are ignored.
            decision: the ids of another forward pass, its `routing.decision`. They replace
                selection, cache, assistance and capacity in this call. Weights, losses and
                gradients are formed from this call's logits. Random numbers are drawn as usual
                (except under torch.compile), so that the generator is in the same state afterwards.
                With assistance the last column has the extra slots.

        Returns:
            hidden_states in x's shape: routed_scaling_factor times the routed experts' output, plus
            the shared experts' output; aux_loss, the weighted terms of `balance`; and the routing.

        Raises:
            RuntimeError: a shape or dtype does not fit.
            TypeError: decision is not a Decision.
            ValueError: the gate's exact gradient is zero everywhere (top_k = 1 with normalize
                "topk", or normalize "uniform"), or earlier_counts do not apply here.
        """
        tokens, mask = flatten(x, token_mask, self.hidden_size)  # [T, H], [T]
        if self.training:
            self._reminder.count()

        # 1. Logits: one per token and expert, unless a cache knows better.
        recall = None
        if self.cache is not None and decision is None:
            recall = self.cache.recall(mask, tokens.shape[0])
        routed = route(
            self.router,
            tokens.view(x.shape),
            self.num_experts,
            router_input=router_input,
            token_mask=token_mask,
            scorer=recall,
        )
        recalled = None if recall is None else recall.found()
        logits = routed.logits  # [T, E]

        # 2. Decide which experts, who assists them, and what becomes of the slots that find them
        # full: integers only.
        num_tokens = tokens.shape[0] if mask is None else mask.sum()
        if decision is None:
            choice = decide(self, routed, mask, num_tokens, recalled)
        else:
            choice = repeat(self, decision, logits, mask)

        # 3. Weigh: from the unbiased logits.
        weights = choice.weights  # [T, K']
        if weights is None:
            weights = weigh(self, logits, choice.weighed)

        # 4. Dispatch and compute.
        y, statistics = compute(self, tokens, logits, choice.indices, weights, mask)

        # 5. Account: counts, the losses, and the intermediate results for inspection.
        accounted = account(
            self,
            routed,
            choice,
            weights,
            mask,
            num_tokens,
            x.shape[:-1],
            earlier_counts,
            has_logits=recalled is None or recalled.weights is None,
        )
        details = dict(routed.details or {})
        if recall is not None and recalled is not None:
            details |= recall.details(recalled)
        routing = Routing(
            logits=logits,
            weights=weights,
            selected=choice.selected,
            indices=choice.indices,
            token_mask=mask,
            tokens_per_expert=accounted.tokens_per_expert,
            kept_per_expert=accounted.kept_per_expert,
            losses=accounted.losses,
            statistics=statistics,
            details=details,
        )
        return MoEOutput(y.reshape(x.shape), accounted.aux_loss, routing)

    @torch.no_grad()
    def update(
        self, routing: Routing | Sequence[Routing], *, group: ProcessGroup | None = None
    ) -> None:
        """Updates the layer's running state by one step.

        This is the router's usage, then which experts are assisted; the selection bias; the
        estimator's own state; and the cache.

        Call it once per optimizer step, with the routing of that step or with the routings of all
        its micro-batches, whose counts are summed. If torch.distributed is initialised the counts
        are also summed over the processes, so every process must call it.

        Args:
            routing: one, or a list of them.
            group: the processes that hold this layer; None is the layer's process_group.

        Raises:
            TypeError: an item is not a Routing.
            ValueError: the list is empty, or only some of the routings have estimator statistics.
        """
        routings = routings_of(routing)
        check_process_group("MoE", "group", group)
        self._reminder.stop()
        group = self.process_group if group is None else group
        rate = self._balance.selection_bias_rate
        if usage_of(self.router) is not None or rate > 0:
            counts = _reduce.total([r.tokens_per_expert for r in routings], group)
            if (usage := usage_of(self.router)) is not None:
                cast(UsageTracking, self.router).update(counts, counts.sum())
                if self.assistance is not None:
                    self.assistance.update(usage, counts.sum())
            if rate > 0:
                bias = self.widened("selection_bias")
                centred = self._balance.selection_bias_centred
                bias.copy_(update_selection_bias(bias, counts, rate, centred))
        self.estimator.update(_reduce.total([r.statistics for r in routings], group))
        if self.cache is not None:
            self.cache.update(routings)

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 (torch's own)
        super()._load_from_state_dict(*args)
        if self.cache is not None:
            self.cache.clear()

    def extra_repr(self) -> str:
        """The settings that no part of the layer shows."""
        text = f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
        experts = None if isinstance(self.experts, nn.Module) else self.experts
        balance = None if self._balance == _BALANCE else self._balance
        settings: dict[str, object] = {"capacity": self._capacity, "experts": experts}
        settings |= {"balance": balance, "cache": self.cache}
        for name, value in settings.items():
            text += "" if value is None else f", {name}={value!r}"
        scale = self.routed_scaling_factor
        return text if scale == 1 else f"{text}, routed_scaling_factor={scale}"
