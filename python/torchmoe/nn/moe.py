"""The mixture-of-experts layer.

Shapes: T tokens (the input's leading dimensions, flattened), H hidden size, E experts, K = top_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from torchmoe import ops
from torchmoe._checks import (
    Checked,
    Level,
    check_among,
    check_at_least,
    check_choice,
    check_counts,
    check_device,
    check_dtype,
    check_experts,
    check_flag,
    check_module,
    check_not_negative,
    check_output,
    check_output_device,
    check_process_group,
    check_tensor,
    check_token_mask,
    shown,
)
from torchmoe.losses import Loss, LossInputs
from torchmoe.nn import _reduce
from torchmoe.nn._balance import (
    FRACTION_CHOICES,
    FRACTIONS_FROM,
    check_losses,
    count,
    count_by_sequence,
    function_of,
    name_of,
    shares,
)
from torchmoe.nn._buffers import Remembering, wide_dtype
from torchmoe.nn._compatibility import (
    check_assistance,
    check_backup_size,
    check_choosing,
    check_estimator,
    check_groups,
    check_part,
    check_usage,
    least_experts,
)
from torchmoe.nn._first_values import reset, reset_all
from torchmoe.nn._reminder import UpdateReminder
from torchmoe.nn._rows import wide
from torchmoe.nn._table import Table
from torchmoe.nn.assistance import Assistance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.estimators.estimator import Estimator, ExpertFunction
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.nn.experts import Experts
from torchmoe.nn.gate import Gate
from torchmoe.nn.routers.context_router import ContextRouter, RouterOutput, route
from torchmoe.nn.routers.router import Router
from torchmoe.nn.routing import ADVICE, Decision, MoEOutput, Routing, before_drop, ids_of
from torchmoe.selection_bias import update_selection_bias

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DEFAULT_GATE = Gate()


class MoE(Remembering):
    """Routes each token to top_k of num_experts feed-forward networks and adds up their outputs.

    A forward pass changes no buffer and keeps nothing. What is to be remembered is in the returned
    `routing`, and `update`, called once per optimizer step, takes it from there:

        output = moe(x)
        loss = task_loss(output.hidden_states) + output.aux_loss
        loss.backward()
        optimizer.step()
        moe.update(output.routing)

    torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=True) turns the result into a plain
    tuple, of which hidden_states and aux_loss train the layer as ever and nothing in routing
    carries a gradient; with use_reentrant=False it is as without checkpointing.

    Args:
        hidden_size: H.
        intermediate_size: the experts' inner width; may be None when `experts` are given.
        num_experts: E.
        top_k: experts per token, in [1, E].
        activation: of the experts, see `Experts`.
        bias: gives the experts' projections a bias; the router's is Router(bias=True).
        gate: how weights are formed and their gradient estimated.
        capacity: limits the slots of an expert; None keeps every slot.
        assistance: gives experts under sustained load a backup in one more slot. An instance
            belongs to one layer.
        balance_weight: coefficient of load_balancing_loss in aux_loss.
        z_loss_weight: coefficient of router_z_loss in aux_loss; at 0 it is not computed.
        losses: further terms of aux_loss as (term, weight): the name of a function in
            `torchmoe.losses`, or a function of your own from `torchmoe.losses.LossInputs` to a
            scalar, which goes by its __name__.
        fraction_from: where the fractions of load_balancing_loss come from, each expert's share of
            the slots. "batch": the tokens of this call. "sequence": each sequence on its own, the
            losses averaged (the last leading dimension of x is the sequence; DeepSeek-V3, arXiv
            2412.19437, equation 17). "global_batch": the calls of all processes, summed by an
            all-reduce in forward, in training mode only, which every process must reach (Qiu et
            al., arXiv 2501.11873), also one without tokens; each process's mean scores are its own.
            With n_r counted tokens here, n in all and W processes, the term is n_r W / n times the
            process's own, so that the mean over the processes of terms and of gradients is that of
            one batch of all tokens, whatever each holds. The other terms of aux_loss are means over
            the process's own tokens. "history": the router's `usage`. With "history" and, for equal
            numbers of sequences, "sequence", accumulating the gradients of micro-batches gives
            exactly that of one batch; see `earlier_counts` for the others.
        fraction_choices: "all" choices of a token count in the fractions, or the "first" only
            (GShard, arXiv 2006.16668). History knows all choices only.
        process_group: the processes of "global_batch" and of `update`; None is all. It cannot be
            pickled: a layer that was must be given one before it is asked for its group.
        selection_bias_rate: above 0 the layer has a selection bias that `update` moves by this much
            against the load, see `torchmoe.update_selection_bias`.
        selection_bias_centred: keeps the mean of the selection bias where it is.
        shared_experts: a module [T, H] -> [T, H] whose output is added for every token.
        routed_scaling_factor: multiplies the routed experts' output, not the shared ones'.
        router: replaces the router: a module from gate inputs [T, G] to logits [T, E], such as
            `CosineRouter` and `HashRouter`, or a `ContextRouter`, such as `SequenceRouter` and
            `ExpertChoiceRouter`.
        experts: replaces the experts: anything called as experts(x, indices, weights) -> y [T, H].
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        balance_weight: see above; may be changed at any time, as process_group, z_loss_weight and
            routed_scaling_factor, and selection_bias_rate where the layer has a selection bias.
        z_loss_weight: see above.
        router: the router.
        estimator: the gradient estimator, from gate.
        assistance: see above.
        experts: the experts.
        shared_experts: see above.
        selection_bias: [E] buffer, float32 or wider, or None: when set, experts are ranked by
            score_function(logits) + selection_bias. It never enters the weights.

    Raises:
        TypeError: a size is not an int, or a part has another type.
        ValueError: a value is out of range or does not go with another, or a replaced part has
            another number of experts.
    """

    wide_buffers = ("selection_bias",)
    selection_bias: Tensor | None
    balance_weight = Checked(check_not_negative)
    selection_bias_rate = Checked(check_not_negative)
    selection_bias_centred = Checked(check_flag)
    z_loss_weight = Level()
    _z_loss_weight: float | None
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
        gate: Gate = _DEFAULT_GATE,
        capacity: Capacity | None = None,
        assistance: Assistance | None = None,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        losses: Sequence[tuple[str | Loss, float]] = (),
        fraction_from: str = "batch",
        fraction_choices: str = "all",
        process_group: ProcessGroup | None = None,
        selection_bias_rate: float = 0.0,
        selection_bias_centred: bool = False,
        shared_experts: nn.Module | None = None,
        routed_scaling_factor: float = 1.0,
        router: nn.Module | None = None,
        experts: ExpertFunction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("MoE", "hidden_size", hidden_size, 1)
        check_at_least("MoE", "num_experts", num_experts, 1)
        check_among("MoE", "top_k", top_k, num_experts)
        check_flag("MoE", "bias", bias)
        # Before they are set: a module in their place would become a part of this one.
        check_not_negative("MoE", "balance_weight", balance_weight)
        check_not_negative("MoE", "selection_bias_rate", selection_bias_rate)
        check_not_negative("MoE", "routed_scaling_factor", routed_scaling_factor)
        check_device("MoE", device)
        check_dtype("MoE", dtype)
        if not isinstance(gate, Gate):
            name = gate if isinstance(gate, str) else "exact"
            raise TypeError(
                f'MoE: gate must be a Gate, such as Gate(estimator="{name}"), got {shown(gate)}'
            )
        check_groups(gate, num_experts, top_k)
        if capacity is not None and not isinstance(capacity, Capacity):
            raise TypeError(
                "MoE: capacity must be a Capacity or None, such as Capacity(1.25), "
                f"got {shown(capacity)}"
            )
        backup = None if capacity is None else capacity.backup
        check_backup_size(backup, num_experts)
        if assistance is not None and not isinstance(assistance, Assistance):
            raise TypeError(
                f"MoE: assistance must be an Assistance or None, got {shown(assistance)}"
            )
        if shared_experts is not None:
            check_module("MoE", "shared_experts", shared_experts)
        if router is not None:
            check_module("MoE", "router", router)
        if experts is not None:
            check_experts("MoE", experts)
        check_process_group("MoE", "process_group", process_group)
        check_choice("MoE", "fraction_from", fraction_from, FRACTIONS_FROM)
        check_choice("MoE", "fraction_choices", fraction_choices, FRACTION_CHOICES)
        if fraction_from == "history" and fraction_choices != "all":
            raise ValueError(
                'MoE: fraction_choices must be "all" with fraction_from "history", '
                f'got "{fraction_choices}"'
            )
        check_part("router", router, num_experts=num_experts)
        check_part("experts", experts, num_experts=num_experts, hidden_size=hidden_size)
        check_part("assistance", assistance, num_experts=num_experts)

        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity = capacity
        self.balance_weight = balance_weight
        self.losses, z_loss_weight = check_losses(losses, z_loss_weight)
        self.z_loss_weight = z_loss_weight
        self.fraction_from = fraction_from
        self.fraction_choices = fraction_choices
        self._process_group = _reduce.SharedGroup(process_group)
        self.selection_bias_rate = selection_bias_rate
        self.selection_bias_centred = selection_bias_centred
        self.routed_scaling_factor = routed_scaling_factor

        readers = {
            "a dynamic capacity": capacity is not None and capacity.dynamic,
            "assistance": assistance is not None,
            'fraction_from "history"': fraction_from == "history",
        }
        reader = next((name for name, reads in readers.items() if reads), None)
        if router is None:
            router = Router(
                hidden_size,
                num_experts,
                track_usage=reader is not None,
                device=device,
                dtype=dtype,
            )
        check_usage(router, reader)
        readers["a selection bias"] = selection_bias_rate > 0
        readers["usage_scaling"] = any(
            getattr(module, "usage_scaling", False) for module in router.modules()
        )
        check_choosing(
            router,
            top_k=top_k,
            gate=gate,
            selection_bias_rate=selection_bias_rate,
            capacity=capacity,
            assistance=assistance,
        )
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
        normalize = gate.normalize
        if normalize is None and isinstance(router, ContextRouter):
            normalize = router.default_normalize
        self.estimator = build_estimator(gate.estimator)
        self.estimator.bind(
            top_k=top_k,
            num_experts=num_experts,
            hidden_size=hidden_size,
            score_function=gate.score_function,
            normalize=normalize,
            num_groups=gate.num_groups,
            top_groups=gate.top_groups,
            device=device,
            dtype=dtype,
        )
        readers[f"the estimator {type(self.estimator).__name__}"] = (
            type(self.estimator).update is not Estimator.update
        )
        self._reminder = UpdateReminder(name for name, reads in readers.items() if reads)
        check_estimator(router, experts, self.estimator)
        if assistance is not None:
            assistance.bind(least_experts(router, self.estimator))
        check_assistance(assistance, router, self.estimator)
        self.assistance: Assistance | None = assistance
        if assistance is not None and device is not None:
            assistance.to(device)
        self.experts = experts
        self.shared_experts: nn.Module | None = shared_experts
        selection_bias = None
        if selection_bias_rate > 0:
            selection_bias = torch.zeros(num_experts, device=device, dtype=wide_dtype(dtype))
        self.register_buffer("selection_bias", selection_bias)
        self._backup = None if backup is None else Table(backup, device)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes of "global_batch" and of `update`; None is all.

        Copies share it; one that was pickled must be given its own.
        """
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        check_process_group("MoE", "process_group", group)
        self._process_group = _reduce.SharedGroup(group)

    def reset_parameters(self) -> None:
        """Gives the parameters and buffers of every part their first values again."""
        for part in (self.router, self.estimator, self.assistance, self.experts):
            reset(part)
        if self.shared_experts is not None:
            reset_all(self.shared_experts)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

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
                = 0, no gradient, and no place in counts, capacity and losses; what x holds there,
                NaN included, does not matter.
            earlier_counts: [E] integers, the counts of earlier micro-batches of the same optimizer
                step in this process: the sum of their routings' tokens_per_expert (with
                fraction_choices "first", of their first choices). They are added to this call's
                before the fractions of load_balancing_loss are formed. With fraction_from "batch"
                and "global_batch" only.
            router_input: x's leading dimensions and any others: what a router that looks at each
                token alone reads instead of x, such as token ids for `HashRouter` or other vectors
                [..., G]; a `ContextRouter` says what it takes. Floating-point entries of masked
                tokens do not matter.
            decision: the ids of another forward pass, its `routing.decision`, which take the place
                of selection, assistance and capacity here. Weights, losses and gradients are formed
                from this call's logits. Random numbers are drawn as without, so that the generator
                is left as by a pass that decides, but under torch.compile. With assistance the last
                column is its slots.

        Returns:
            hidden_states in x's shape: routed_scaling_factor times the routed experts' output plus
            that of the shared ones; aux_loss = balance_weight * load_balancing_loss + z_loss_weight
            * router_z_loss + the weighted `losses`; and the routing.

        Raises:
            RuntimeError: a shape or dtype does not fit.
            TypeError: decision is no Decision.
            ValueError: the gate's exact gradient is zero everywhere (top_k = 1 with normalize
                "topk", or normalize "uniform"), or earlier_counts have no meaning here.
        """
        tokens, mask = self._flatten(x, token_mask)  # [T, H], [T]
        if self.training:
            self._reminder.count()
        num_tokens = tokens.shape[0] if mask is None else mask.sum()

        # 1. Logits: one per token and expert.
        given = route(
            self.router,
            tokens.view(x.shape),
            self.num_experts,
            router_input=router_input,
            token_mask=token_mask,
        )
        logits = given.logits  # [T, E]

        # 2. Decide which experts, who assists them, and what becomes of the slots that find them
        # full: integers only.
        asking = None
        if decision is None:
            chosen = self._choose(given, mask)  # [T, K]
            selected = chosen if self.assistance is None else self.assistance(chosen)  # [T, K']
            asking = self._asking_weights(logits, selected)  # [T, K'] or None
            indices = self._limit(logits, selected, asking, num_tokens)  # [T, K']
        else:
            assisted = self.assistance is not None
            columns = self.top_k + 1 if assisted else None
            selected, indices = ids_of(decision, tokens.shape[0], mask, columns)
            chosen = selected[:, :-1] if assisted else selected
            self._draw_as_if_deciding(logits, selected, mask)

        # 3. Weigh: from the unbiased logits, and before slots are dropped unless asked otherwise,
        # which concerns the normalisation alone.
        weighed = self._weighed(selected, indices, decision is not None)  # [T, K']
        weights = asking
        if weights is None or weighed is not selected:
            weights = self._weigh(logits, weighed)  # [T, K']

        # 4. Dispatch and compute.
        combined = self.estimator.combine(
            tokens, logits, indices, weights, self.experts, token_mask=mask
        )
        y, statistics = combined if isinstance(combined, tuple) else (combined, None)  # [T, H]
        check_output(
            "MoE",
            "gate.estimator.combine",
            y,
            tokens.shape,
            "[num_tokens, hidden_size]",
            tokens.device,
        )
        y = self._add_shared(y, tokens, mask)

        # 5. Account: counts, the losses, and everything above for whoever wants to look.
        tokens_per_expert = count(chosen, self.num_experts)  # [E]
        kept_per_expert = (
            tokens_per_expert if indices is chosen else count(indices, self.num_experts)
        )
        counts = tokens_per_expert
        if self.fraction_choices == "first":
            counts = count(chosen[:, :1], self.num_experts)
        sequence_shape = x.shape[:-1] if self.fraction_from == "sequence" else None
        losses = {
            "load_balancing_loss": self._balancing_loss(
                logits, chosen, counts, num_tokens, mask, sequence_shape, earlier_counts
            )
        }
        aux_loss = self.balance_weight * losses["load_balancing_loss"]
        loss_inputs = LossInputs(
            logits=logits,
            weights=weights,
            indices=weighed,
            token_mask=mask,
            score_function=self.estimator.score_function,
            num_experts=self.num_experts,
            top_k=self.top_k,
            clean_logits=logits if given.clean_logits is None else given.clean_logits,
            noise_deviation=given.noise_deviation,
        )
        for name, term, weight in self._weighted_losses():
            losses[name] = check_output(
                "MoE", f'the term "{name}" of losses', term(loss_inputs), (), "a scalar", x.device
            )
            aux_loss = aux_loss + weight * losses[name]

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
            details={} if given.details is None else dict(given.details),
        )
        return MoEOutput(y.reshape(x.shape), aux_loss, routing)

    @torch.no_grad()
    def update(
        self, routing: Routing | Sequence[Routing], *, group: ProcessGroup | None = None
    ) -> None:
        """Moves by one step what the layer remembers.

        The router's usage, then who is assisted; the selection bias; the estimator's own state.

        Call it once per optimizer step, with the routing of that step or with those of all its
        micro-batches, whose counts are summed. When torch.distributed is initialised the counts are
        summed over the processes too, so every process must call.

        Args:
            routing: one, or a list of them.
            group: the processes that hold this layer; None is the layer's process_group.

        Raises:
            TypeError: an item is not a Routing.
            ValueError: the list is empty, or only some hold the estimator's statistics.
        """
        if not isinstance(routing, Routing | Iterable):
            raise TypeError(
                "MoE: routing must be a Routing, such as moe(x).routing, or a list of them, "
                f"got {shown(routing)}"
            )
        check_process_group("MoE", "group", group)
        routings = [routing] if isinstance(routing, Routing) else list(routing)
        for item in routings:
            if not isinstance(item, Routing):
                raise TypeError(
                    "MoE: routing must be a Routing, such as moe(x).routing, or a list of them, "
                    f"got {type(item).__name__}"
                )
        if not routings:
            raise ValueError("MoE: routing must hold at least one Routing, got an empty list")
        self._reminder.stop()
        group = self.process_group if group is None else group
        keeps_usage = getattr(self.router, "usage", None) is not None
        moves_bias = self.selection_bias is not None and self.selection_bias_rate > 0
        if keeps_usage or moves_bias:
            counts = _reduce.total([r.tokens_per_expert for r in routings], group)
            if keeps_usage:
                cast(Router, self.router).update(counts, counts.sum())
            if self.assistance is not None:
                self.assistance.update(cast(Tensor, self.router.usage), counts.sum())
            if self.selection_bias is not None and moves_bias:
                bias = self.widened("selection_bias")
                moved = update_selection_bias(
                    bias, counts, self.selection_bias_rate, self.selection_bias_centred
                )
                bias.copy_(moved)
        self.estimator.update(_reduce.total([r.statistics for r in routings], group))

    def extra_repr(self) -> str:
        """The settings that no part of the layer shows."""
        text = f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
        if self.capacity is not None:
            text += f", capacity={self.capacity}"
        if not isinstance(self.experts, nn.Module):
            text += f", experts={self.experts!r}"
        text += f", balance_weight={self.balance_weight}, z_loss_weight={self.z_loss_weight}"
        if self.losses:
            listed = ", ".join(f"({name_of(term)!r}, {weight})" for term, weight in self.losses)
            text += f", losses=[{listed}]"
        for name, usual in (
            ("fraction_from", "batch"),
            ("fraction_choices", "all"),
            ("selection_bias_rate", 0.0),
            ("selection_bias_centred", False),
            ("routed_scaling_factor", 1.0),
        ):
            if (value := getattr(self, name)) != usual:
                text += f", {name}={value!r}"
        return text

    def _flatten(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(x, MoEOutput):
            raise TypeError(f"MoE: x must be a tensor, got a MoEOutput; {ADVICE}")
        check_tensor("MoE", "x", x)
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise RuntimeError(
                f"MoE: x must be [..., hidden_size] = [..., {self.hidden_size}], "
                f"got shape {list(x.shape)}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        if token_mask is None:
            return tokens, None
        check_token_mask("MoE", token_mask, x, x.dim() - 1)
        mask = token_mask.reshape(-1)
        # Attention leaves NaN at positions that see nothing; 0 * NaN would carry it into the
        # router's gradient.
        return tokens.masked_fill(~mask.unsqueeze(-1), 0), mask

    def _choose(self, given: RouterOutput, mask: Tensor | None) -> Tensor:
        """The choice of the router where it makes one, else the estimator's."""
        if given.indices is None:
            chosen = self.estimator.select(
                given.logits, selection_bias=self.selection_bias, token_mask=mask
            )
            expected = (given.logits.shape[0], self.top_k)
            if not isinstance(chosen, Tensor):
                raise TypeError(
                    f"MoE: gate.estimator.select must return a tensor, got {shown(chosen)}"
                )
            if chosen.dtype != torch.int64 or chosen.shape != expected:
                raise RuntimeError(
                    "MoE: gate.estimator.select must return int64 [num_tokens, top_k] = "
                    f"{list(expected)}, got {chosen.dtype} of shape {list(chosen.shape)}"
                )
            check_output_device("MoE", "gate.estimator.select", chosen, given.logits.device)
            return chosen
        return given.indices if mask is None else given.indices.masked_fill(~mask[:, None], -1)

    def _draw_as_if_deciding(self, logits: Tensor, selected: Tensor, mask: Tensor | None) -> None:
        """Draws what a pass that decides draws, and forgets it.

        Else what is random later in a recomputation would be other than in its forward pass. A
        compiler removes draws that nobody reads.
        """
        if torch.compiler.is_compiling():
            return
        if self.estimator.draws:
            self.estimator.select(logits, selection_bias=self.selection_bias, token_mask=mask)
            if self.capacity is not None and self.capacity.overflow != "drop":
                self._asking_weights(logits, selected)
        self._random_priority(selected)

    def _random_priority(self, selected: Tensor) -> Tensor | None:
        """A draw for every slot, in training, where the capacity has such a priority."""
        if self.capacity is None or self.capacity.priority != "random" or not self.training:
            return None
        return torch.rand(selected.shape, device=selected.device)

    def _asking_weights(self, logits: Tensor, selected: Tensor) -> Tensor | None:
        """The weights with which slots ask for room, where those decide who gets it.

        They are the layer's own where nothing is rerouted: an estimator that draws would give other
        ones a second time.
        """
        if self.capacity is None or self.capacity.priority != "weight":
            return None
        return self._weigh(logits, selected)

    def _weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The weights of the slots.

        Constant ones would leave a router that could learn untrained, which gate_weights refuses
        where the logits want a gradient. They may want one for the sake of x alone: to a router
        that is frozen a gradient of zero is no loss.
        """
        if self.estimator.has_constant_weights(ids.shape[1]) and not any(
            parameter.requires_grad for parameter in self.router.parameters()
        ):
            logits = logits.detach()
        return check_output(
            "MoE",
            "gate.estimator.weigh",
            self.estimator.weigh(logits, ids),
            ids.shape,
            "[num_tokens, top_k]",
            ids.device,
        )

    def _limit(
        self, logits: Tensor, selected: Tensor, asking: Tensor | None, num_tokens: int | Tensor
    ) -> Tensor:
        capacity = self.capacity
        if capacity is None:
            return selected
        slots = capacity.slots(
            num_tokens,
            self.num_experts,
            self.top_k,
            training=self.training,
            usage=cast(Tensor, self.router.usage) if capacity.dynamic else None,
        )
        priority = self._random_priority(selected) if asking is None else asking.detach()
        scores = tie_break = None
        if capacity.overflow != "drop":
            scores = self.estimator.rank(logits, selection_bias=self.selection_bias)
            tie_break = self.estimator.tie_break(logits, selection_bias=self.selection_bias)
        return ops.limit_capacity(
            selected,
            slots.expand(self.num_experts) if isinstance(slots, Tensor) else slots,
            order=capacity.order,
            priority=priority,
            overflow=capacity.overflow,
            scores=scores,
            backup=None if self._backup is None else self._backup.on(selected.device),
            tie_break=tie_break,
            num_experts=self.num_experts,
        )

    def _weighed(self, selected: Tensor, indices: Tensor, replayed: bool) -> Tensor:
        """The ids that weights are formed for."""
        capacity = self.capacity
        if capacity is not None:
            if capacity.normalize == "after_drop" and self.estimator.normalize != "none":
                return indices
            replayed = replayed or capacity.overflow != "drop"
        # A replayed decision may be that of a layer which reroutes.
        return before_drop(selected, indices) if replayed else selected

    def _add_shared(self, y: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self._routed_scaling_factor is not None:
            y = self._routed_scaling_factor * y
        if self.shared_experts is None:
            return y
        shared = check_output(
            "MoE",
            "shared_experts",
            self.shared_experts(tokens),
            y.shape,
            "[num_tokens, hidden_size]",
            y.device,
        )
        if mask is not None:
            shared = shared.masked_fill(~mask.unsqueeze(-1), 0)
        return y + shared.to(y.dtype)

    def _weighted_losses(self) -> list[tuple[str, Loss, float]]:
        """The terms beside load_balancing_loss."""
        given: list[tuple[str | Loss, float]] = []
        if self._z_loss_weight is not None:
            given.append(("router_z_loss", self._z_loss_weight))
        return [
            (name_of(term), function_of(term), weight) for term, weight in (*given, *self.losses)
        ]

    def _balancing_loss(
        self,
        logits: Tensor,
        chosen: Tensor,
        counts: Tensor,
        num_tokens: int | Tensor,
        mask: Tensor | None,
        sequence_shape: torch.Size | None,
        earlier_counts: Tensor | None,
    ) -> Tensor:
        part = None
        if earlier_counts is not None:
            self._check_earlier(earlier_counts, counts)
            counts = counts + earlier_counts
        if self.fraction_from == "history":
            counts = cast(Tensor, self.router.usage)
        elif self.fraction_from == "global_batch" and self.training:
            counts, part = _reduce.counts_and_part(
                counts, num_tokens, self.process_group, wide(logits[:0]).dtype
            )
        elif sequence_shape is not None:
            length = sequence_shape[-1] if len(sequence_shape) else 1
            sequences = math.prod(sequence_shape[:-1])
            logits = logits.view(sequences, length, self.num_experts)
            mask = None if mask is None else mask.view(sequences, length)
            choices = chosen[:, : 1 if self.fraction_choices == "first" else None]
            counts = count_by_sequence(choices, sequences, length, self.num_experts)
        loss = ops.load_balancing_loss(
            logits,
            shares(counts, logits.dtype),
            score_function=self.estimator.score_function,
            token_mask=mask,
        )
        return loss if part is None else part * loss

    def _check_earlier(self, earlier_counts: Tensor, counts: Tensor) -> None:
        if self.fraction_from not in ("batch", "global_batch"):
            raise ValueError(
                f'MoE: earlier_counts must be None with fraction_from "{self.fraction_from}", '
                f"got {shown(earlier_counts)}"
            )
        check_counts(
            "MoE",
            "earlier_counts",
            earlier_counts,
            self.num_experts,
            counts.device,
            whole=True,
        )
