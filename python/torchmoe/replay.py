"""Routing replay: the choices of one forward pass, repeated in another."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchmoe._checks import check_module, shown
from torchmoe._recomputation import Recomputation, in_backward, surroundings
from torchmoe.nn._layers import Hook, moe_layers
from torchmoe.nn.routing import Decision, MoEOutput


class RoutingReplay:
    """Records which experts every MoE layer of a model chose, and makes it choose them again.

        replay = torchmoe.RoutingReplay(model)
        with replay.record():
            loss = model(x)
        with replay.force():
            again = model(x)

    It records the layers' decisions: the ids as selected and as routed, after capacity and
    assistance, bit for bit. While they are forced, no layer selects, reroutes or drops; weights,
    losses and gradients follow from the layer's own logits at those ids. Random numbers are still
    drawn, whether they are used or not. The router's noise, the factor of SparseMixer's weights
    and any dropout after the layer are therefore the same as in a pass that decides (except under
    torch.compile, which removes draws that are not used). Two uses:

    - Activation recomputation cannot route differently from the forward pass, whatever the rest of
      the model does: record the forward pass and force during backward, or force both.
    - A checkpoint can be evaluated under the routing of another: record one model, and force the
      other with `RoutingReplay(other, replay.decisions)`.

    Hooks follow the layers; copies of the model do not inherit them. A layer is known by its path
    in the model, without the names that torch.compile and DistributedDataParallel add. A layer that
    is called several times has several decisions, which are forced in the order of recording.

    A call that backward recomputes takes the decision of the original call, whatever the order of
    the backward passes. Calls that were recorded or forced are identified by the checkpoint around
    them: either kind of `torch.utils.checkpoint.checkpoint`, or another library's that is a
    torch.autograd.Function. Checkpoints may be nested and may hold several calls. Other forward
    passes cannot be identified: those that were neither recorded nor forced (such as when decisions
    from a file are forced during backward), those followed by another `RoutingReplay`, and those in
    any other kind of checkpoint. Their recomputation takes the decision of the last call that has
    not been recomputed yet. That is correct if every call has a checkpoint of its own and the last
    one is recomputed first, as in a single backward pass.

    Under torch.compile each layer breaks the graph while it is recorded or forced, so
    fullgraph=True fails. Enter `record` or `force` before the compiled model runs for the first
    time: torch does not look for hooks again until torch.compiler.reset() makes it recompile.
    `MoE.forward(decision=...)` has neither limit.

    Args:
        model: any module that contains `torchmoe.nn.MoE` layers.
        decisions: the decisions to start with, from another replay or a file.

    Attributes:
        decisions: by layer, (selected, indices) of each call; see `torchmoe.nn.Decision`. Plain
            containers of tensors, which torch.load(weights_only=True) takes.

    Raises:
        TypeError: model is not a module, or decisions hold anything but pairs of int64 tensors.
        ValueError: the model has no such layer, or the decisions belong to other layers.
    """

    decisions: dict[str, list[tuple[Tensor, Tensor]]]

    def __init__(
        self,
        model: nn.Module,
        decisions: Mapping[str, Sequence[Sequence[Tensor]]] | None = None,
    ) -> None:
        check_module("RoutingReplay", "model", model, called=False)
        self._layers = moe_layers(model)
        if not self._layers:
            raise ValueError(
                f"RoutingReplay: model must contain a torchmoe.nn.MoE, got {type(model).__name__}"
            )
        decisions = {} if decisions is None else decisions
        if not isinstance(decisions, Mapping):
            raise TypeError(
                f"RoutingReplay: decisions must be a mapping or None, got {shown(decisions)}"
            )
        if decisions and decisions.keys() != self._layers.keys():
            raise ValueError(
                f"RoutingReplay: decisions must be of the layers {', '.join(self._layers)}, "
                f"got {', '.join(decisions)}"
            )
        self.decisions = {name: _pairs(name, calls) for name, calls in decisions.items()}
        self._checkpoints = _Checkpoints()

    def record(self) -> AbstractContextManager[None]:
        """Clears the record and records the calls inside the block, except recomputations."""
        return _Entered("record", self._record)

    def force(self) -> AbstractContextManager[None]:
        """Makes the calls inside the block take the recorded decisions, from the first one on.

        Raises:
            RuntimeError: a layer is called more often than was recorded, or with another number of
                tokens, or more often in a recomputation than in its forward pass.
        """
        return _Entered("force", self._force)

    def _record(self, stack: ExitStack) -> None:
        self.decisions = {name: [] for name in self._layers}
        for name, layer in self._layers.items():
            hook = _Recording(name, self.decisions[name], self._checkpoints)
            # Before other hooks, which may replace the output by something else.
            stack.callback(layer.register_forward_hook(hook, prepend=True).remove)

    def _force(self, stack: ExitStack) -> None:
        for name, layer in self._layers.items():
            queue = _Queue(name, self.decisions.get(name, ()))
            hook = _Forcing(name, queue, self._checkpoints)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _pairs(name: str, calls: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The decisions of a layer's calls; raises TypeError unless they are pairs of int64 tensors."""
    pairs = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        pair = tuple(call) if isinstance(call, Sequence) else ()
        if len(pair) != 2 or not all(_are_ids(ids) for ids in pair):
            raise TypeError(
                "RoutingReplay: decisions must hold a pair of int64 tensors for each call, "
                f"got {shown(call)} for {name}"
            )
        pairs.append(pair)
    return pairs


def _are_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64


class _Entered(ContextDecorator, AbstractContextManager[None]):
    """Hooks that exist while it is entered; warns if it was never entered."""

    def __init__(self, method: str, register: Callable[[ExitStack], None]) -> None:
        self._method = method
        self._register = register
        self._stack: ExitStack | None = None

    def __enter__(self) -> None:
        with ExitStack() as stack:
            self._register(stack)
            self._stack = stack.pop_all()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stack is not None:
            self._stack.close()

    def __del__(self) -> None:
        if self._stack is None:
            warnings.warn(
                f"RoutingReplay: {self._method} must be entered, as in `with replay."
                f"{self._method}():`, got a call without, which does nothing",
                RuntimeWarning,
                stacklevel=2,
            )


class _Checkpoint:
    """The decisions of the calls inside one checkpoint, by layer."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Decision]] = defaultdict(list)
        self._run: Hashable = None
        self._taken: dict[str, int] = defaultdict(int)

    def add(self, name: str, decision: Decision) -> None:
        self._calls[name].append(decision)

    def next(self, name: str, run: Hashable) -> Decision:
        """The decision of the layer's next call in this recomputation."""
        if run != self._run:
            self._run, self._taken = run, defaultdict(int)
        calls, number = self._calls[name], self._taken[name]
        if number == len(calls):
            raise RuntimeError(
                f"RoutingReplay: {name} must be called as often in a recomputation as in its "
                f"forward pass, {number} times, got one call more"
            )
        self._taken[name] += 1
        return calls[number]


class _Checkpoints:
    """What is known of the checkpoints in the graphs that are alive."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[object, _Checkpoint] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._of)

    def __reduce__(self) -> tuple[type[_Checkpoints], tuple[()]]:
        # A copy of a replay belongs to none of the graphs.
        return _Checkpoints, ()

    def add(self, around: Iterable[object], name: str, decision: Decision) -> None:
        """Takes the decision of a call inside of these checkpoints' forward passes."""
        for checkpoint in around:
            self._of.setdefault(checkpoint, _Checkpoint()).add(name, decision)

    def next(self, recomputation: Recomputation, name: str) -> Decision | None:
        """The decision of the call that is recomputed; None if its forward pass is not known."""
        known = self._of.get(recomputation.checkpoint)
        return None if known is None else known.next(name, recomputation.run)


class _Queue:
    """The decisions of a layer in the order in which they are to be forced.

    A recomputed call that cannot be identified takes the decision of the last call that has not
    been recomputed yet.
    """

    def __init__(self, name: str, decisions: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._name = name
        self._waiting = deque(Decision(*decision) for decision in decisions)
        self._number = len(self._waiting)
        self._taken: list[Decision] = []
        # By the graph node whose gradient needs the recomputation: for the current backward pass,
        # and for the one before, as the current one may go through the same graph again.
        self._task = -1
        self._of_node: dict[object, Decision] = {}
        self._of_node_before: dict[object, Decision] = {}

    def next(self) -> Decision:
        """The decision of the call that is about to begin."""
        if not self._waiting:
            raise self._error()
        self._taken.append(self._waiting.popleft())
        return self._taken[-1]

    def recomputed(self) -> Decision:
        """The decision of the call that is about to be recomputed."""
        task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if task != self._task:
            self._task, self._of_node_before, self._of_node = task, self._of_node, {}
        if node in self._of_node:
            raise RuntimeError(
                f"RoutingReplay: {self._name} must be called once in a checkpoint whose forward "
                "pass was neither recorded nor forced, got a second call in its recomputation"
            )
        decision = self._of_node_before.get(node)
        if decision is None:
            if not self._taken and not self._waiting:
                raise self._error()
            decision = self._taken.pop() if self._taken else self._waiting.pop()
        self._of_node[node] = decision
        return decision

    def _error(self) -> RuntimeError:
        return RuntimeError(
            f"RoutingReplay: {self._name} must be called as often as it was recorded, "
            f"{self._number} times, got one call more"
        )


class _Recording(Hook[Callable[[MoEOutput], None]]):
    """Appends the decision of each call that is not a recomputation."""

    def __init__(
        self, name: str, decisions: list[tuple[Tensor, Tensor]], checkpoints: _Checkpoints
    ) -> None:
        super().__init__(self._remember)
        self._name = name
        self._decisions = decisions
        self._checkpoints = checkpoints

    def __call__(self, moe: nn.Module, args: Any, output: MoEOutput) -> None:  # noqa: ANN401
        self.run(output)

    def _remember(self, output: MoEOutput) -> None:
        forward, recomputation = surroundings()
        if recomputation is None and not in_backward():
            decision = output.routing.decision
            self._decisions.append((decision.selected, decision.indices))
            self._checkpoints.add(forward, self._name, decision)


class _Forcing(Hook[Callable[[], Decision]]):
    """Hands each call its decision."""

    def __init__(self, name: str, queue: _Queue, checkpoints: _Checkpoints) -> None:
        super().__init__(self._next)
        self._name = name
        self._queue = queue
        self._checkpoints = checkpoints

    def __call__(
        self, moe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "decision": self.run()}

    def _next(self) -> Decision:
        forward, recomputation = surroundings()
        if recomputation is None and not in_backward():
            decision = self._queue.next()
        else:
            known = recomputation and self._checkpoints.next(recomputation, self._name)
            decision = known or self._queue.recomputed()
        # A checkpoint inside a recomputed one is not the one that the forward pass had.
        self._checkpoints.add(forward, self._name, decision)
        return decision
