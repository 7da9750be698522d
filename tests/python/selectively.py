"""A function under selective activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)


def selectively(
    function: Callable[..., Any],
    *args: Any,
    save: tuple[object, ...] = (),
    seen: list[str] | None = None,
) -> Any:
    """The function under a policy that saves the ops `save` and notes what it was asked about."""

    def policy(
        context: SelectiveCheckpointContext, op: torch._ops.OpOverload, *_: object, **__: object
    ) -> CheckpointPolicy:
        if seen is not None and op.namespace == "torchmoe" and not context.is_recompute:
            seen.append(op._schema.name.removeprefix("torchmoe::"))
        return CheckpointPolicy.MUST_SAVE if op in save else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
