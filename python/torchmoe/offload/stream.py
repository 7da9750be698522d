"""A call of experts of which some must be read first: they run in groups, as they arrive.

An expert's rows do not depend on what else runs in the same call of an op. So a group's rows are
computed alone, with each slot as a token that has one expert, and kept in the dtype of sums; when
all groups have run, the rows of a token are added up and rounded as `torchmoe.ops.expert_mlp` does.
Where every expert that is needed is resident one call of the op does it all.

The rows are sorted by `ResidentSet.keys`, so that residents come first and in the order of their
slots. What is saved for the backward pass is what the op saves: x, the weights, the pre-activation
and integers.

On a CUDA device the CPU waits for it once in each forward pass, to learn which experts are needed.
The backward pass knows them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from torchmoe._wide import wide_dtype
from torchmoe.offload.resident import ResidentSet, in_order
from torchmoe.ops import DispatchPlan

_ops = torch.ops.torchmoe


class Rows(NamedTuple):
    """The rows of one expert."""

    expert: int
    begin: int
    end: int


class Sorted(NamedTuple):
    """The slots of a call, sorted by the numbers that the experts had when it began."""

    plan: DispatchPlan
    """Over S + E numbers."""
    rows: list[Rows]
    """Those of each expert that has some, in order."""

    def saved(self) -> tuple[Tensor, ...]:
        """All of it as tensors; the rows [R, 3] are on the CPU.

        A checkpoint that runs the call again replaces saved tensors by those of the second run, and
        nothing else.
        """
        rows = torch.tensor(self.rows, dtype=torch.int64, device="cpu").view(-1, 3)
        return *self.plan, rows

    @classmethod
    def of_saved(cls, *saved: Tensor) -> Sorted:
        """What has been saved."""
        *plan, rows = saved
        return cls(DispatchPlan(*plan), [Rows(*row) for row in rows.tolist()])


class _Placed(NamedTuple):
    """The rows of an expert that is in a slot."""

    slot: int
    begin: int
    end: int


class Stream:
    """Computes with experts that come and go.

    Args:
        residents: the experts in memory.
        names: what residents.memory.matrices calls w_in, b_in, w_out and b_out; None for no bias.
        activation: see `torchmoe.ops.expert_mlp`.

    Attributes:
        residents: as given.
        predict: gives what the next layer will need, from this layer's x and indices.
        ahead: the stream of that layer, or None.
        behind: the stream of the layer before, whose backward pass comes next, or None.
        last_slots: how many slots each expert had in the last forward pass that a backward pass may
            follow.
    """

    def __init__(
        self,
        residents: ResidentSet,
        names: tuple[str, str | None, str, str | None],
        activation: str,
    ) -> None:
        self.residents = residents
        self.names = names
        self.activation = activation
        self.predict: Callable[[Tensor, Tensor], Mapping[int, int]] | None = None
        self.ahead: weakref.ref[Stream] | None = None
        self.behind: weakref.ref[Stream] | None = None
        self.last_slots: dict[int, int] = {}
        self._expected: Mapping[int, int] | None = None  # what was predicted for the next call

    def run(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As `torchmoe.ops.expert_mlp`, for arguments that it takes."""
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        # A transform of torch.func may want a gradient that its tensors inside do not tell of.
        keeps_pre = torch.is_grad_enabled() and any(
            tensor.requires_grad or is_wrapped(tensor) for tensor in (x, weights)
        )
        if not keeps_pre and forward_ad._current_level < 0:
            return self.forward(x, indices, weights, keeps_pre)[0]
        apply = cast(Callable[..., tuple[Any, ...]], _Forward.apply)
        return cast(Tensor, apply(x, weights, indices, self, keeps_pre)[0])

    def forward(
        self, x: Tensor, indices: Tensor, weights: Tensor, keeps_pre: bool
    ) -> tuple[Tensor, Tensor, Sorted]:
        """The output [T, H], the pre-activation [N, P] or [0, P], and what its rows are."""
        residents = self.residents
        with residents.held(), _uncounted():
            residents.settle()
            order = self._sorted(indices)
            plan, rows = order
            slots = {row.expert: row.end - row.begin for row in rows}
            self._begin(slots, keeps_pre)
            turn = functools.partial(self._look_ahead, x, indices)
            placed = self._placed(rows)
            if placed is not None:
                turn()
                with self._matrices(placed, 0, residents.num_slots) as matrices:
                    y, pre = _ops._expert_mlp.default(
                        x, weights, *matrices, plan.row_to_slot, plan.slot_to_row,
                        keeps_pre, self.activation,
                    )  # fmt: skip
                return y, pre, order
            wide = wide_dtype(residents.memory.matrices[self.names[0]].dtype)
            num_rows, top_k = plan.row_to_slot.numel(), indices.shape[1]
            outputs = x.new_empty(num_rows, x.shape[1], dtype=wide)
            width = residents.memory.matrices[self.names[0]].shape[1]
            stored = residents.memory.matrices[self.names[0]].dtype
            pre = x.new_empty(num_rows if keeps_pre else 0, width, dtype=stored)

            def run(group: list[_Placed]) -> None:
                local = _Local(group, plan)
                ones = x.new_ones(local.num_rows, 1, dtype=wide)
                of_tokens = x[local.slots // top_k]
                with self._matrices(group, local.first, local.last) as matrices:
                    y, of_group = _ops._expert_mlp.default(
                        of_tokens, ones, *matrices, *local.identity, keeps_pre, self.activation,
                        wide=True,
                    )  # fmt: skip
                outputs[local.rows] = y
                if keeps_pre:
                    pre[local.rows] = of_group

            self._run_all(rows, run, turn)
            y = _ops.unpermute.default(outputs, weights.to(wide), *plan)
            return y.to(x.dtype), pre, order

    def backward(
        self,
        grad: Tensor,
        weights: Tensor,
        pre: Tensor,
        order: Sorted,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the weights, as far as they are wanted."""
        residents, plan, rows = self.residents, *order
        of_x, of_weights = wanted
        mask = [of_x, of_weights, False, False, False, False]
        grad = grad.contiguous()
        with residents.held():
            residents.settle()
            self._begin({row.expert: row.end - row.begin for row in rows})
            turn = self._look_back
            placed = self._placed(rows)
            # The op reads x for gradients of matrices alone: grad, of the same shape, stands in.
            if placed is not None:
                turn()
                with self._matrices(placed, 0, residents.num_slots) as matrices:
                    grads = _ops._expert_mlp_backward.default(
                        grad, grad, weights, *matrices, plan.row_to_slot, plan.slot_to_row, pre,
                        mask, self.activation,
                    )  # fmt: skip
                return grads[0] if of_x else None, grads[1] if of_weights else None
            wide = wide_dtype(pre.dtype)
            num_rows, top_k = plan.row_to_slot.numel(), weights.shape[1]
            grad_rows = grad.new_empty(num_rows if of_x else 0, grad.shape[1], dtype=wide)
            grad_weights = weights.new_zeros(weights.numel())
            flat = weights.reshape(-1)

            def run(group: list[_Placed]) -> None:
                local = _Local(group, plan)
                of_group = grad[local.slots // top_k]
                weights_of_group, pre_of_group = flat[local.slots].unsqueeze(1), pre[local.rows]
                with self._matrices(group, local.first, local.last) as matrices:
                    grads = _ops._expert_mlp_backward.default(
                        of_group, of_group, weights_of_group, *matrices, *local.identity,
                        pre_of_group, mask, self.activation, wide=True,
                    )  # fmt: skip
                if of_x:
                    grad_rows[local.rows] = grads[0]
                if of_weights:
                    grad_weights[local.slots] = grads[1].squeeze(1)

            self._run_all(rows, run, turn)
        grad_x = None
        if of_x:
            ones = grad.new_ones(weights.shape, dtype=wide)
            grad_x = _ops.unpermute.default(grad_rows, ones, *plan).to(grad.dtype)
        return grad_x, grad_weights.view_as(weights) if of_weights else None

    def prefetch(self, slots: Mapping[int, int], *, predicted: bool) -> None:
        """Asks for experts ahead of this stream's next call, unless a call is under way."""
        with self.residents.try_held() as held:
            if held:
                self.residents.prefetch(slots)
                if predicted:
                    self._expected = slots

    def _sorted(self, indices: Tensor) -> Sorted:
        """The rows of a call that begins now."""
        num_experts, num_slots = self.residents.store.num_experts, self.residents.num_slots
        keys = self.residents.keys()
        # Any id outside of [0, E) finds the last entry.
        of_expert = self.residents.memory.moved(keys.of_expert)
        ids = of_expert[indices.clamp(-1, num_experts)]
        plan = DispatchPlan(*_ops.dispatch_plan.default(ids, num_slots + num_experts))
        bounds = pairwise(plan.expert_offsets.tolist())
        rows = [
            Rows(expert, begin, end)
            for expert, (begin, end) in zip(keys.of_key, bounds, strict=True)
            if begin < end
        ]
        return Sorted(plan, rows)

    def _begin(self, slots: dict[int, int], keeps_pre: bool = False) -> None:
        self.residents.begin(slots)
        if keeps_pre:
            self.last_slots = slots
        expected, self._expected = self._expected, None
        if expected is not None:
            right = sum(expert in expected for expert in slots)
            self.residents.counters.prediction(right, len(slots) - right)

    def _look_ahead(self, x: Tensor, indices: Tensor) -> None:
        """Prefetches for the next layer, as soon as this call has asked for all that it needs.

        What is recomputed in a backward pass goes the other way.
        """
        if torch._C._current_graph_task_id() != -1:
            self._look_back()
        elif self.predict is not None and (ahead := _alive(self.ahead)) is not None:
            ahead.prefetch(self.predict(x, indices), predicted=True)

    def _look_back(self) -> None:
        """Prefetches for the layer before, whose backward pass comes next."""
        if (behind := _alive(self.behind)) is not None:
            behind.prefetch(behind.last_slots, predicted=False)

    def _placed(self, rows: list[Rows]) -> list[_Placed] | None:
        """The rows if all their experts are resident, in the order of the slots; else None."""
        slots = self.residents.residents
        placed = [_Placed(slots.get(row.expert, -1), row.begin, row.end) for row in rows]
        numbers = [-1, *(row.slot for row in placed)]
        return placed if all(a < b for a, b in pairwise(numbers)) else None

    def _run_all(
        self, rows: list[Rows], run: Callable[[list[_Placed]], None], turn: Callable[[], None]
    ) -> None:
        """Runs every expert once, in groups of those that are there, and reads the others."""
        residents = self.residents
        by_expert = {row.expert: row for row in rows}
        left = set(by_expert)  # those that have not run, which must not be evicted
        missing = [
            expert
            for expert in in_order({row.expert: row.end - row.begin for row in rows})
            if expert not in residents.residents and expert not in residents.loading
        ]
        has_turned = False
        while left:
            residents.settle(left)
            while missing and residents.load(missing[0], keep=left):
                missing.pop(0)
            if not missing and not has_turned:
                has_turned = True
                turn()
            ready = [expert for expert in left if expert in residents.residents]
            if not ready:
                residents.wait(left)
                continue
            group = self._first_of(ready, bool(missing))
            slots = residents.residents
            run(sorted(_Placed(slots[expert], *by_expert[expert][1:]) for expert in group))
            left.difference_update(group)

    def _first_of(self, ready: list[int], more: bool) -> list[int]:
        """Those of the experts in memory that run next.

        While others wait for a slot, those that are to leave run first and make room, so that the
        thread that reads has something to do.
        """
        if not more:
            return ready
        count = (len(ready) + 1) // 2 if self.residents.is_reading else 1
        return self.residents.policy.ranked(ready)[:count]

    @contextmanager
    def _matrices(
        self, group: list[_Placed], first: int, last: int
    ) -> Iterator[list[Tensor | None]]:
        """The experts of an op that computes a group whose rows are joined.

        Args:
            group: in the order of the slots.
            first: the first slot that the op is given; there may be other experts between.
            last: behind the last one.

        Yields:
            w_in, b_in, w_out and b_out of the slots, and where the rows of each of them begin.
        """
        memory = self.residents.memory
        counts = [0] * (last - first)
        for placed in group:
            counts[placed.slot - first] = placed.end - placed.begin
        offsets = memory.moved(memory.integers([*accumulate(counts, initial=0)]))
        matrices = [
            None if name is None else memory.matrices[name][first:last] for name in self.names
        ]
        with memory.used([placed.slot for placed in group]):
            yield [*matrices, offsets]


class _Local:
    """A group's rows as a plan of their own, in which each slot is a token.

    Args:
        group: in the order of the slots.
        plan: of the whole call.

    Attributes:
        first, last: the slots of the group lie between.
        num_rows: of the group.
        rows: which rows of the call they are.
        slots: [num_rows], the call's slots t*K + j.
        identity: row_to_slot and slot_to_row of the group's own plan.
    """

    def __init__(self, group: list[_Placed], plan: DispatchPlan) -> None:
        self.first, self.last = group[0].slot, group[-1].slot + 1
        self.num_rows = sum(placed.end - placed.begin for placed in group)
        self.rows: slice | Tensor
        device = plan.row_to_slot.device
        if all(a.end == b.begin for a, b in pairwise(group)):
            self.rows = slice(group[0].begin, group[-1].end)
        else:
            self.rows = torch.cat([torch.arange(*placed[1:], device=device) for placed in group])
        self.slots = plan.row_to_slot[self.rows]
        numbers = torch.arange(self.num_rows, device=device)
        self.identity = numbers, numbers.unsqueeze(1)


def _uncounted() -> AbstractContextManager[object]:
    """Hides ops from selective checkpoints, which know a result by the number of its op.

    How many ops run, and in what order, is another thing each time; so all of them run again.
    """
    depth = torch._C._len_torch_dispatch_stack()
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(depth)]
    if any(isinstance(m, _CachingTorchDispatchMode | _CachedTorchDispatchMode) for m in modes):
        return cast(AbstractContextManager[object], torch._C._DisableTorchDispatch())
    return nullcontext()


def _alive(reference: weakref.ref[Stream] | None) -> Stream | None:
    return None if reference is None else reference()


_FIRST_ORDER = "OffloadedExperts: derivatives must be first ones in reverse mode, got "


class _Differentiated(torch.autograd.Function):
    """What both directions refuse."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:  # noqa: ANN401
        del info, in_dims, args
        raise RuntimeError(f"{_FIRST_ORDER}a batch of vmap")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ANN401
        del ctx, tangents
        raise RuntimeError(f"{_FIRST_ORDER}a tangent of forward mode")


class _Forward(_Differentiated):
    """Experts that are read as they are needed, in either direction."""

    @staticmethod
    def forward(
        x: Tensor, weights: Tensor, indices: Tensor, stream: Stream, keeps_pre: bool
    ) -> tuple[Tensor, ...]:
        """The output, and what the backward pass needs."""
        y, pre, order = stream.forward(x, indices, weights, keeps_pre)
        return y, pre, *order.saved()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        """Saves it."""
        x, weights, _indices, ctx.stream, _keeps_pre = inputs
        _y, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # of these
        ctx.save_for_backward(x, weights, *saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The gradients of x and the weights."""
        apply = cast(Callable[..., tuple[Tensor | None, ...]], _Backward.apply)
        wanted = tuple(ctx.needs_input_grad[:2])
        return *apply(grad, *ctx.saved_tensors, ctx.stream, wanted), None, None, None


class _Backward(_Differentiated):
    """The gradients, as a function of all that they depend on, which says that it has none."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weights: Tensor,
        pre: Tensor,
        offsets: Tensor,
        row_to_slot: Tensor,
        slot_to_row: Tensor,
        rows: Tensor,
        stream: Stream,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both, as far as they are wanted."""
        del x
        order = Sorted.of_saved(offsets, row_to_slot, slot_to_row, rows)
        return stream.backward(grad, weights, pre, order, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:  # noqa: ANN401
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ANN401
        """Refuses."""
        del ctx, grads
        raise RuntimeError(f"{_FIRST_ORDER}a derivative of a gradient")
