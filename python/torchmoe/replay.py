"""Routing replay: the choices of one forward pass, taken again in another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchmoe.nn._layers import Hook, in_backward, moe_layers
from torchmoe.nn.routing import Decision, MoEOutput


class RoutingReplay:
    """Records which experts every MoE layer of a model chose, and makes it choose them again.

        replay = torchmoe.RoutingReplay(model)
        with replay.record():
            loss = model(x)
        with replay.force():
            again = model(x)

    What is recorded are the layers' decisions: the ids as selected and as routed, after capacity
    and assistance, bit for bit. While they are forced, no layer selects, reroutes or drops;
    weights, losses and gradients follow from the layer's own logits at those ids. Random numbers
    are drawn as ever, used or not: the router's noise in the logits, the factor of SparseMixer's
    weights and, after the layer, dropout are those of a pass that decides (not under torch.compile,
    which removes draws that nobody reads). So

    - activation recomputation cannot route otherwise than the forward pass did, whatever the rest
      of the model does: record the forward pass, and force while backward runs, or force both;
    - a checkpoint can be evaluated under the routing of another: record one model, and force the
      other by `RoutingReplay(other, replay.decisions)`.

    The layers are followed by hooks, which copies of the model do not inherit, and go by their path
    in the model, without what torch.compile and DistributedDataParallel put into it. A layer that
    is called several times has several decisions; they are forced in the order they were recorded
    in. What backward recomputes takes the decision of the last call that it has not recomputed yet.
    So where a layer is called several times before backward runs, all of its calls must be
    recomputed, each in a `torch.utils.checkpoint` of its own, and the last one first, as one
    backward pass does.

    Under torch.compile each layer breaks the graph while it is recorded or forced, so that
    fullgraph=True refuses. Enter `record` or `force` before the compiled model runs for the first
    time: torch does not look for hooks again, unless torch.compiler.reset() makes it compile anew.
    `MoE.forward(decision=...)` has neither limit.

    Args:
        model: any module with `torchmoe.nn.MoE` layers in it.
        decisions: those to start with, from another replay or a file.

    Attributes:
        decisions: by layer, (selected, indices) of each call; see `torchmoe.nn.Decision`. Plain
            containers of tensors, which torch.load(weights_only=True) takes.

    Raises:
        ValueError: the model has no such layer, or the decisions are of others.
    """

    decisions: dict[str, list[tuple[Tensor, Tensor]]]

    def __init__(
        self,
        model: nn.Module,
        decisions: Mapping[str, Sequence[Sequence[Tensor]]] | None = None,
    ) -> None:
        self._layers = moe_layers(model)
        if not self._layers:
            raise ValueError(
                f"RoutingReplay: model must contain a torchmoe.nn.MoE, got {type(model).__name__}"
            )
        decisions = decisions or {}
        if decisions and decisions.keys() != self._layers.keys():
            raise ValueError(
                f"RoutingReplay: decisions must be of the layers {', '.join(self._layers)}, "
                f"got {', '.join(decisions)}"
            )
        self.decisions = {
            name: [(selected, indices) for selected, indices in calls]
            for name, calls in decisions.items()
        }

    @contextmanager
    def record(self) -> Iterator[None]:
        """Forgets what was recorded, and records the calls inside, but no recomputation."""
        self.decisions = {name: [] for name in self._layers}
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                hook = _Recording(self.decisions[name])
                # Before other hooks, which may replace the output by something else.
                stack.callback(layer.register_forward_hook(hook, prepend=True).remove)
            yield

    @contextmanager
    def force(self) -> Iterator[None]:
        """Makes the calls inside take what was recorded, from the first call on.

        Raises:
            RuntimeError: a layer is called more often than it was recorded, or with another number
                of tokens, or twice in what one checkpoint recomputes.
        """
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                hook = _Forcing(_Queue(name, self.decisions.get(name, ())))
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


class _Queue:
    """The decisions of a layer in the order in which they are to be forced."""

    def __init__(self, name: str, decisions: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._name = name
        self._waiting = deque(Decision(*decision) for decision in decisions)
        self._number = len(self._waiting)
        self._taken: list[Decision] = []
        # By the node of the graph whose gradient needs what is recomputed: those of the backward
        # pass at work, and of the one before, which may go through the same graph once more.
        self._task = -1
        self._of_node: dict[object, Decision] = {}
        self._of_node_before: dict[object, Decision] = {}

    def next(self) -> Decision:
        """The decision of the call that is about to begin."""
        if in_backward():
            return self._recomputed()
        if not self._waiting:
            raise self._error()
        self._taken.append(self._waiting.popleft())
        return self._taken[-1]

    def _recomputed(self) -> Decision:
        task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if task != self._task:
            self._task, self._of_node_before, self._of_node = task, self._of_node, {}
        if node in self._of_node:
            raise RuntimeError(
                f"RoutingReplay: {self._name} must be called once in a checkpoint, got a second "
                "call in its recomputation"
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
    """Appends the decision of each call, but of no recomputation."""

    def __init__(self, decisions: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(self._remember)
        self._decisions = decisions

    def __call__(self, moe: nn.Module, args: Any, output: MoEOutput) -> None:  # noqa: ANN401
        self.run(output)

    def _remember(self, output: MoEOutput) -> None:
        if not in_backward():
            selected, indices = output.routing.decision
            self._decisions.append((selected, indices))


class _Forcing(Hook[Callable[[], Decision]]):
    """Hands each call its decision."""

    def __init__(self, queue: _Queue) -> None:
        super().__init__(queue.next)

    def __call__(
        self, moe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "decision": self.run()}
