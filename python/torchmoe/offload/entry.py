"""The entry: what is given is checked, written to the store if need be, and becomes a module."""

from __future__ import annotations

import os
import tempfile

import torch

from torchmoe._checks import check_at_least, check_choice, check_device, check_flag, shown
from torchmoe.nn import Experts
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.offload.experts import OffloadedExperts
from torchmoe.offload.files import checked_path
from torchmoe.offload.layout import stored_sizes
from torchmoe.offload.policies import POLICIES, Trace
from torchmoe.offload.slots import SLOTS
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

Path = str | os.PathLike[str]


def offload(
    experts: Experts,
    *,
    budget: int,
    store: Path | None = None,
    policy: str = "usage",
    prefetch: bool = True,
    trace: Trace | None = None,
    device: torch.device | str | None = None,
) -> OffloadedExperts:
    """Moves frozen experts into a file and streams them back as they are needed.

    What it returns takes the experts' place, with the same results bit for bit:

        moe.experts.requires_grad_(False)
        moe.experts = offload(moe.experts, budget=256 << 20, store="experts.safetensors")

    The router and everything else train as before. For a model that fits into no memory, make the
    layer with device="meta", write the store with `write_store`, and give its experts here.

    Opening the store, which includes one that has just been written, reads all of it once and
    compares its SHA-256, which takes as long as reading so many bytes from the disk.

    Experts on a CUDA device stay there: residents lie in its memory, and others are read into
    pinned memory of the CPU and copied on a stream of their own while the device computes. In each
    forward pass the CPU waits once for the device, to learn which experts the call needs, and once
    more for a layer that predicts (see `link`). This has not yet been run on a GPU.

    Args:
        experts: frozen, on the CPU, a CUDA device or the meta device. Those that hold values are
            written to the store, one at a time if they are not on the CPU, and their parameters
            become meta tensors, so that their memory is free as soon as nobody else refers to it.
            On the meta device they describe what a store that exists holds.
        budget: bytes of memory for copies of the experts' matrices: residents, the pages of the
            store that reading leaves in the page cache for a moment, and for a CUDA device one
            expert in pinned memory. What allocators round up and activations are not among them.
        store: the file. None: a temporary one, which has no name and is gone with the process.
        policy: which resident is evicted for another expert: "usage", the one with the smallest
            running average of its share of the slots (0.99 of it stays with each call); "lru", the
            one that was needed longest ago; "lfu", the one that the fewest calls have needed;
            "oracle", the one that is needed last in `trace`, to see how much the others leave.
        prefetch: whether `link` may make reads ahead of a call.
        trace: for "oracle", the ids that each coming call needs, forward and backward each a call.
        device: where the experts compute, for those on the meta device; None is the CPU. For others
            it is their own.

    Returns:
        The module.

    Raises:
        TypeError: experts are not `torchmoe.nn.Experts`, or an argument is of another kind.
        ValueError: experts require a gradient, a store is missing, the budget holds no expert, or
            device is not that of the experts.
        RuntimeError: torch cannot use the device.
        OSError: the store cannot be written or read.
    """
    if type(experts) is not Experts:
        raise TypeError(f"offload: experts must be torchmoe.nn.Experts, got {shown(experts)}")
    check_at_least("offload", "budget", budget, 1)
    check_choice("offload", "policy", policy, POLICIES)
    check_flag("offload", "prefetch", prefetch)
    _check_trace(policy, trace)
    refuse_sharded("offload", "experts", experts)
    for name, parameter in experts.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                "offload: experts must be frozen, as experts.requires_grad_(False) makes them, "
                f"got {name} that requires a gradient"
            )
    device = _device(experts, device)
    num_slots = _num_slots(experts, budget, device)
    is_meta = experts.down_proj.is_meta
    if store is not None:
        store = checked_path("offload", "store", store)
    elif is_meta:
        raise ValueError("offload: store must be given for experts on the meta device, got None")
    opened = _opened(experts, store, write=not is_meta)
    offloaded = OffloadedExperts(
        experts,
        opened,
        budget=budget,
        num_slots=num_slots,
        policy=policy,
        prefetch=prefetch,
        trace=trace,
        device=device,
        is_temporary=store is None,
    )
    experts.to("meta")
    return offloaded


def _check_trace(policy: str, trace: Trace | None) -> None:
    if POLICIES[policy].looks_ahead:
        if not isinstance(trace, list | tuple):
            raise TypeError(
                f'offload: trace must be a list for policy "{policy}", got {shown(trace)}'
            )
    elif trace is not None:
        raise ValueError(f'offload: trace must be None for policy "{policy}", got {shown(trace)}')


def _device(experts: Experts, device: torch.device | str | None) -> torch.device:
    """Where the experts compute."""
    check_device("offload", device)
    own, *others = {parameter.device for parameter in experts.parameters()}
    if others or (own.type != "meta" and own.type not in SLOTS):
        raise ValueError(
            "offload: experts must be on the CPU, on one CUDA device or on the meta device, "
            f"got {' and '.join(sorted(map(str, (own, *others))))}"
        )
    if device is None:
        return torch.device("cpu") if own.type == "meta" else own
    wanted = torch.device(device)
    if wanted.type not in SLOTS:
        raise ValueError(f"offload: device must be the CPU or a CUDA device, got {wanted}")
    try:
        wanted = torch.empty(0, device=wanted).device  # with its index
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"offload: device must be one that torch can use, got {wanted}"
        ) from error
    if own.type != "meta" and own != wanted:
        raise ValueError(f"offload: device must be that of the experts ({own}), got {wanted}")
    return wanted


def _num_slots(experts: Experts, budget: int, device: torch.device) -> int:
    """How many experts can be resident."""
    expert_bytes, window_bytes = stored_sizes("offload", experts)
    reading_bytes = window_bytes + SLOTS[device.type].num_staged * expert_bytes
    least = expert_bytes + reading_bytes
    if budget < least:
        raise ValueError(
            f"offload: budget must be at least {least}, {expert_bytes} bytes for one expert and "
            f"{reading_bytes} for reading, got {budget}"
        )
    return min((budget - reading_bytes) // expert_bytes, experts.num_experts)


def _opened(experts: Experts, store: Path | None, *, write: bool) -> ExpertStore:
    """The store, written before if asked to."""
    if store is not None:
        if write:
            write_store(store, experts)
        return ExpertStore.open(store, experts)
    # An open file without a name lives as long as the one who has it open.
    with tempfile.TemporaryDirectory(prefix="torchmoe-offload-") as folder:
        path = os.path.join(folder, "experts.safetensors")
        write_store(path, experts)
        return ExpertStore.open(path, experts)
