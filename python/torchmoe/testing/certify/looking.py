"""What the ops below a layer's forward pass tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_RANKING = ("aten::topk", "aten::sort", "aten::argsort", "aten::kthvalue", "aten::max")
COUNTING = ("cumsum",)
_CAPACITY = ("torchmoe::limit_capacity",)
_SCORING = ("aten::_softmax", "aten::sigmoid")
_NARROW = (torch.bfloat16, torch.float16)


class Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes decisions that are taken over the tokens, and scores of 16 bits.

    Args:
        num_tokens: T of the call; no other size of the layer should equal it or K times it.
        top_k: K, 1 where it is not known.
        num_experts: E, 0 where it is not known.
    """

    def __init__(self, num_tokens: int, top_k: int, num_experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lengths = {num_tokens, num_tokens * top_k}
        self._num_experts = num_experts
        self._rounded: list[Tensor] = []  # which keeps their ids theirs
        self.over_tokens: str | None = None
        """The op that ranks or counts along the tokens, None where there is none."""
        self.ranks_rounded: str | None = None
        """The op that ranks what was rounded to 16 bits just before."""
        self.narrow_scores: str | None = None
        """The op that forms the scores of all experts in 16 bits."""

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        if name in _CAPACITY:
            self.over_tokens = name
        elif args and isinstance(args[0], Tensor) and args[0].dim() > 0:
            self._look(name, args[0], args, kwargs, result)
        return result

    def _look(
        self,
        name: str,
        first: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: object,
    ) -> None:
        floats = first.is_floating_point()
        if (name in _RANKING and floats) or (name.split("::")[1] in COUNTING and not floats):
            position = 2 if name == "aten::topk" else 1
            dim = kwargs.get("dim", args[position] if len(args) > position else -1)
            if isinstance(dim, int) and first.shape[dim] in self._lengths:
                self.over_tokens = name
        if name in _RANKING and any(first is tensor for tensor in self._rounded):
            self.ranks_rounded = name
        scores = first.shape[-1] == self._num_experts and first.dtype in _NARROW
        if name in _SCORING and scores:
            self.narrow_scores = name
        if name == "aten::_to_copy" and floats and isinstance(result, Tensor):
            self._note_cast(first, result)

    def _note_cast(self, before: Tensor, after: Tensor) -> None:
        if after.dtype in _NARROW and before.dtype not in _NARROW:
            self._rounded.append(after)
