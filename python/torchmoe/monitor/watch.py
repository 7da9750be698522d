"""Follows the routing of a model's layers from outside, with forward hooks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchmoe._checks import check_at_least, check_flag, check_module
from torchmoe._recomputation import in_backward
from torchmoe.monitor._history import History, Record
from torchmoe.monitor._intake import Intake
from torchmoe.monitor.statistics import SCALARS, RoutingStatistics
from torchmoe.nn._layers import Hook, moe_layers
from torchmoe.nn.moe import MoE
from torchmoe.nn.routing import MoEOutput, Routing

_COLLECT, _LOG = "collect", "log"


def watch(
    model: nn.Module, *, evaluation: bool = False, every: int = 1, max_records: int = 4096
) -> Watcher:
    """Follows every MoE layer inside a model, without changes to the model.

        with torchmoe.watch(model) as watcher:
            for step, batch in enumerate(batches):
                train(model, batch)
                if step % 100 == 0:
                    watcher.log(writer, step)
        watcher.summary()
        watcher.plot("load.png")

    The watcher follows the model from this call on, until its block ends, it is closed, or it is no
    longer referenced. In a notebook `watcher = torchmoe.watch(model)` works without `with`.

    Layers are found anywhere, also inside WithAttachedLoss, DistributedDataParallel or a compiled
    model. They are known by their path in the model ("moe" if the model is the layer), without what
    torch.compile adds to it. For each forward pass a few values per expert and layer are kept:
    nothing waits for the device, no graph is kept alive, and once every layer has run nothing of
    the size of the tokens is kept either. Each process follows its own tokens.

    A pass is followed if the layer is in training mode, whether or not gradients are computed. A
    layer that is called several times in a step has several passes. Recomputation by either kind of
    activation checkpointing does not count as a pass. A pass in which no token counts enters the
    means as zeros.

    Passes under torch.compile are followed too, but each followed layer breaks the graph (a loop
    over such layers runs outside of it), so fullgraph=True fails. Call watch once before the
    compiled model runs for the first time: torch does not look for hooks again until
    torch.compiler.reset() makes it recompile. A replayed CUDA graph runs no hooks; torch.export is
    not followed.

    Args:
        model: any module that contains `torchmoe.nn.MoE` layers.
        evaluation: also follows passes in evaluation mode.
        every: follows one of every so many passes of a layer, the first, for models with very short
            steps.
        max_records: the most records kept for a layer, each of 16 E + 72 bytes. Beyond that,
            neighbouring passes share one.

    Returns:
        A context manager that returns itself. It keeps its data after the block ends or it is
        closed, and continues when it is entered again.

    Raises:
        TypeError: model is not a module, evaluation is not a bool, or a number is not an int.
        ValueError: a number is too small, or the model has no such layer.
    """
    check_module("watch", "model", model, called=False)
    check_flag("watch", "evaluation", evaluation)
    check_at_least("watch", "every", every, 1)
    check_at_least("watch", "max_records", max_records, 2)
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"watch: model must contain a torchmoe.nn.MoE, got {type(model).__name__}")
    intake = Intake(len(layers))
    return Watcher(
        {
            name: _Layer(moe, History(max_records, (_COLLECT, _LOG)), intake, evaluation, every)
            for name, moe in layers.items()
        },
        intake,
        evaluation,
    )


class Writer(Protocol):
    """What `Watcher.log` needs: a torch.utils.tensorboard.SummaryWriter, or the same methods."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any: ...  # noqa: D102, ANN401
    def add_histogram(self, tag: str, values: Tensor, step: int, /) -> Any: ...  # noqa: D102, ANN401


class Watcher:
    """The result of `watch`: the routing of a model's layers, pass by pass.

    `collect` and `log` each give the passes since their last call; `summary`, `to_records` and
    `plot` give the whole history. Over several passes tokens_per_expert and kept_per_expert are
    sums; all other statistics are means over the passes, including dead_experts. An expert without
    a slot in any of the passes is therefore one whose sum is 0.
    """

    def __init__(self, layers: dict[str, _Layer], intake: Intake, evaluation: bool) -> None:
        self._layers = layers
        self._intake = intake
        self._evaluation = evaluation
        self._entered = False
        self._handles: list[RemovableHandle] = []
        self._follow()
        # The model's hooks hold the layers and not the watcher, and the handles hold no model.
        weakref.finalize(self, _remove, self._handles).atexit = False

    def __enter__(self) -> Watcher:
        if self._entered:
            raise RuntimeError(
                "watch: watcher must be left before it is entered, got entered twice"
            )
        self._entered = True
        self._follow()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops following, as leaving the block does. The data is kept."""
        self._entered = False
        _remove(self._handles)
        self._intake.complete()

    def collect(self) -> dict[str, RoutingStatistics]:
        """The statistics of the passes since the last call, by layer.

        Returns:
            Tensors on the layer's device, without waiting for it; dead_experts is float64, like all
            means. A layer without a pass is left out.
        """
        return {name: record.statistics() for name, record in self._read(_COLLECT).items()}

    def log(self, writer: Writer, step: int) -> None:
        """Writes the passes since the last call to TensorBoard.

        Writes LAYER/NAME for each scalar statistic, and LAYER/load, the histogram of the experts'
        loads, where 1 is the even share.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter.
            step: the position on the x axis.
        """
        for name, record in self._read(_LOG).items():
            statistics = record._replace(sums=record.sums.cpu()).statistics()
            for scalar in SCALARS:
                writer.add_scalar(f"{name}/{scalar}", getattr(statistics, scalar).item(), step)
            load = statistics.tokens_per_expert.double()
            writer.add_histogram(f"{name}/load", load * len(load) / load.sum().clamp(min=1), step)

    def summary(self) -> None:
        """Prints a table with a row for each layer, over all passes so far."""
        try:
            from torchmoe.monitor._table import print_table
        except ImportError as error:
            raise missing("watch", "summary", "rich") from error
        layers = {name: history.total() for name, history in self._histories().items()}
        if any(layers.values()):
            print_table(layers)
        else:
            print(f"watch: {self._nothing_seen()}")

    def to_records(self) -> list[dict[str, Any]]:
        """The whole history as plain numbers and lists, for example for pandas.DataFrame.

        With `every`, passes that are skipped are numbered but do not count in `forwards`.

        Returns:
            For each layer its records in order: `layer`, `forward` (number of the first pass, from
            0), `forwards` (how many passes), and every statistic under its name.
        """
        return [
            {"layer": name, **record}
            for name, history in self._histories().items()
            for record in history.to_records()
        ]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the load of each expert over the passes, a map for each layer, all on one scale.

        A layer without a pass is left out.

        Args:
            path: the file; its suffix sets the format. A missing folder is created.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there was no pass.
        """
        try:
            from torchmoe.monitor._figure import draw_load
        except ImportError as error:
            raise missing("watch", "plot", "matplotlib") from error
        layers = {
            name: (history.records, self._layers[name].seen)
            for name, history in self._histories().items()
            if history.records
        }
        if not layers:
            raise ValueError(
                f"watch: plot must have a forward pass, got none: {self._nothing_seen()}"
            )
        figure = draw_load(layers)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    def _follow(self) -> None:
        if not self._handles:
            self._handles.extend(layer.follow() for layer in self._layers.values())

    def _read(self, reader: str) -> dict[str, Record]:
        read = {name: history.read(reader) for name, history in self._histories().items()}
        return {name: record for name, record in read.items() if record is not None}

    def _histories(self) -> dict[str, History]:
        """Of each layer, up to now."""
        self._intake.complete()
        return {name: layer.history for name, layer in self._layers.items()}

    def _nothing_seen(self) -> str:
        if self._evaluation:
            return "no forward pass was seen"
        return "no forward pass was seen in training mode; evaluation=True follows all of them"


class _Layer:
    """One layer, its hook and its history."""

    def __init__(
        self, moe: MoE, history: History, intake: Intake, evaluation: bool, every: int
    ) -> None:
        self.moe = moe
        self.history = history
        self.seen = 0
        self._intake = intake
        self._evaluation = evaluation
        self._every = every

    def follow(self) -> RemovableHandle:
        # Before other hooks, which may replace the output by something else.
        hook = _Hook(self.take, self._evaluation)
        return self.moe.register_forward_hook(hook, prepend=True)

    def take(self, routing: Routing) -> None:
        """Counts a pass and keeps what is wanted of it."""
        # An exported program is traced with tensors that hold nothing.
        if in_backward() or torch.compiler.is_exporting():
            return
        if self.seen % self._every == 0:
            self._intake.add(self.history, self.seen, routing)
        self.seen += 1


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Hook(Hook[Callable[[Routing], None]]):
    """What is registered with a layer."""

    def __init__(self, take: Callable[[Routing], None], evaluation: bool) -> None:
        super().__init__(take)
        self._evaluation = evaluation

    def __call__(self, moe: nn.Module, args: Any, output: MoEOutput) -> None:  # noqa: ANN401
        # Not in what is disabled: a layer that is not followed then leaves the graph whole.
        if moe.training or self._evaluation:
            self.run(output.routing)


def missing(owner: str, method: str, package: str) -> ImportError:
    """The error that says which package a method needs and how to get it."""
    return ImportError(f"{owner}: {method} needs {package}: pip install 'torchmoe[watch]'")
