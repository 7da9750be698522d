"""The module that is called as experts, of which a few are in memory and all in a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import Fixed, check_counts, check_not_batched, check_tensor
from torchmoe.nn import Experts
from torchmoe.nn._part import Part
from torchmoe.nn.declarations import ExpertsDeclaration
from torchmoe.offload.loader import Loader
from torchmoe.offload.policies import POLICIES, Trace
from torchmoe.offload.resident import ResidentSet, in_order
from torchmoe.offload.slots import SLOTS
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.stream import Stream


class OffloadedExperts(ExpertsDeclaration, Part):
    """Experts of which a few are in memory and all are in a file; made by `offload`.

    It is called as `torchmoe.nn.Experts` is, and returns the same bits, in both directions. Experts
    that are resident run at once, while a thread reads the others; each of these runs when it has
    arrived. In the backward pass they are read again. Which experts are resident never changes a
    result. One forward or backward pass runs at a time, calls from other threads wait.

    Gradients reach x and the weights. Second derivatives, forward mode and vmap are refused; under
    torch.compile a call is outside the graph; under autocast the experts must be of its dtype. It
    has no parameters. `state_dict` reads all experts from the store into the CPU's memory, under
    their names in `Experts`, and `load_state_dict` accepts them if the store holds the same values.
    The module cannot be pickled or moved to another dtype or device; a deep copy shares the store
    and starts with no residents and without `link`. A forked process starts without residents, too.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: see `Experts`.
        dtype: of the experts.
        store: the path of the file; None for a temporary one.
        budget: bytes, see `offload`.
        num_slots: how many experts can be resident.
        policy: its name.
        prefetch: see `offload`.
        device: where they compute.
    """

    hidden_size = Fixed[int]()
    intermediate_size = Fixed[int]()
    num_experts = Fixed[int]()
    activation = Fixed[str]()
    budget = Fixed[int]()
    num_slots = Fixed[int]()
    policy = Fixed[str]()
    prefetch = Fixed[bool]()
    store = Fixed[str | None]()
    device = Fixed[torch.device]()

    def __init__(
        self,
        experts: Experts,
        store: ExpertStore,
        *,
        budget: int,
        num_slots: int,
        policy: str,
        prefetch: bool,
        trace: Trace | None,
        device: torch.device,
        is_temporary: bool,
    ) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size = experts.hidden_size, experts.intermediate_size
        self.num_experts, self.activation = experts.num_experts, experts.activation
        self.budget, self.policy, self.prefetch = budget, policy, prefetch
        self.store, self.device = None if is_temporary else store.path, device
        self._file, self._trace = store, trace
        self.num_slots = num_slots
        parameters = dict(experts.named_parameters())
        self._like = {
            name: torch.empty_like(parameter, device="meta", requires_grad=False)
            for name, parameter in parameters.items()
        }
        in_name, has_bias = experts._in_name, experts.down_proj_bias is not None
        in_bias, out_bias = (in_name + "_bias", "down_proj_bias") if has_bias else (None, None)
        self._names = in_name, in_bias, "down_proj", out_bias
        self._connect()

    def _connect(self) -> None:
        """Makes what no two modules share."""
        policy = POLICIES[self.policy](self.num_experts, self._trace)
        memory = SLOTS[self.device.type](self._file, self._like, self.num_slots, self.device)
        self._residents = ResidentSet(self._file, memory, self.num_slots, policy, Loader())
        self._stream = Stream(self._residents, self._names, self.activation)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [T, H] in the dtype of the experts.
            indices: [T, K] int64; an id outside [0, E) is not routed.
            weights: [T, K].

        Returns:
            y [T, H] in the dtype of x (under autocast, in the autocast dtype).

        Raises:
            RuntimeError: a shape, dtype or device does not fit, or the store has changed.
            OSError: the store cannot be read.
        """
        if not torch.compiler.is_compiling():  # `disable` would load a compiler
            return self._run(x, indices, weights)
        outside = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        return cast(Tensor, outside(x, indices, weights))

    def _run(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self._stream.run(*self._checked(x, indices, weights))

    def warm(self, usage: Tensor) -> None:
        """Reads the experts that are used most, as many as can be resident, and waits for them.

        The policy "usage" takes the shares for its averages.

        Args:
            usage: [E], each expert's share of the slots, such as a router's `usage`, on `device`.

        Raises:
            RuntimeError: usage has another shape or device.
            ValueError: a value is negative, infinite or NaN.
            OSError: the store cannot be read.
        """
        check_counts("warm", "usage", usage, self.num_experts, self.device)
        shares = dict(enumerate(usage.tolist()))
        first = in_order(shares)[: self.num_slots]
        with self._residents.held():
            self._residents.policy.warm(list(shares.values()))
            self._residents.fill(first)

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts."""
        return self._like["down_proj"].dtype

    @property
    def hits(self) -> int:
        """How often a call, forward or backward, found an expert that it needed in memory."""
        return self._residents.counters.hits

    @property
    def misses(self) -> int:
        """How often a call had to wait for one, or to have it read."""
        return self._residents.counters.misses

    @property
    def hit_rate(self) -> float:
        """The share of hits; NaN before the first call."""
        return _share(self.hits, self.misses)

    @property
    def prediction_hit_rate(self) -> float:
        """Of the experts needed by calls that `link` predicted for, the share that was predicted.

        NaN before the first such call.
        """
        counters = self._residents.counters
        return _share(counters.predicted, counters.unpredicted)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the store; opening it does not count."""
        return self._residents.counters.bytes_read

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in memory, and of the store in the page cache while a read goes on.

        On a CUDA device all slots and the pinned memory are held from the first call on.
        """
        return self._residents.resident_bytes

    @property
    def peak_resident_bytes(self) -> int:
        """The most that resident_bytes has been."""
        return self._residents.peak_resident_bytes

    def reset_counters(self) -> None:
        """Sets hits, misses, bytes_read and what the rates are formed from to 0."""
        self._residents.counters.reset()

    def reset_parameters(self) -> NoReturn:
        """Raises RuntimeError: the store keeps what it has."""
        raise RuntimeError(
            "OffloadedExperts: reset_parameters must be called before the experts are offloaded, "
            "got a call after it"
        )

    def extra_repr(self) -> str:
        """The sizes, the activation and where the experts are."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, activation={self.activation!r}, "
            f"dtype={self.dtype}, num_slots={self.num_slots}, budget={self.budget}, "
            f"policy={self.policy!r}, store={self.store!r}, device={str(self.device)!r}"
        )

    def _checked(
        self, x: Tensor, indices: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments as the op takes them; raises what `torchmoe.ops.expert_mlp` does."""
        for name, tensor in (("x", x), ("indices", indices), ("weights", weights)):
            check_tensor("expert_mlp", name, tensor)
            check_not_batched("OffloadedExperts", name, "be of one sample", tensor)
            if tensor.device != self.device:
                raise RuntimeError(
                    f"OffloadedExperts: {name} must be on the device of the experts "
                    f"({self.device}), got {tensor.device}"
                )
        if torch.is_autocast_enabled(self.device.type):
            x, weights = self._under_autocast(x, weights)
        fits = (
            x.dtype == self.dtype
            and x.dim() == 2
            and x.shape[1] == self.hidden_size
            and indices.dtype == torch.int64
            and indices.dim() == 2
            and indices.shape[0] == x.shape[0]
            and weights.shape == indices.shape
            and weights.dtype in (torch.float32, torch.float64, x.dtype)
        )
        if not fits:
            given = [tensor.to("meta") for tensor in (x, indices, weights)]
            matrices = [None if name is None else self._like[name] for name in self._names]
            cast(Any, ops.expert_mlp)(*given, *matrices, self.activation)
        return x, indices, weights

    def _under_autocast(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What autocast makes of the arguments of `torchmoe.ops.expert_mlp`."""
        dtype = torch.get_autocast_dtype(self.device.type)
        if self.dtype not in (dtype, torch.float64):
            raise RuntimeError(
                "OffloadedExperts: autocast must be of the experts' dtype, as a copy of them in "
                f"another one would be outside of the budget, {self.dtype}, got {dtype}"
            )

        def narrowed(tensor: Tensor, to: torch.dtype) -> Tensor:
            is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(to) if is_cast else tensor

        return narrowed(x, dtype), narrowed(weights, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedExperts:
        # What changes neither dtype nor device, such as `model.cpu()`, has nothing to do.
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise RuntimeError(
                "OffloadedExperts: the experts must stay as they were offloaded, "
                f"{before.dtype} on {before.device}, got a move to {after.dtype} on {after.device}"
            )
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        whole = {name: torch.empty_like(like, device="cpu") for name, like in self._like.items()}
        for expert in range(self.num_experts):
            self._file.read(expert, {name: tensor[expert] for name, tensor in whole.items()})
        destination.update({prefix + name: tensor for name, tensor in whole.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {
            name: state_dict[prefix + name] for name in self._like if prefix + name in state_dict
        }
        if differing := self._differing(given):
            error_msgs.append(
                f"OffloadedExperts: {prefix}{differing} must have the values of the store, which "
                f"offload or write_store writes, got others than {self._file.path} has"
            )
        others = {
            key: value for key, value in state_dict.items() if key not in map(prefix.__add__, given)
        }
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _differing(self, given: dict[str, Tensor]) -> str | None:
        """The first of the tensors that is not as in the store."""
        for name, tensor in given.items():
            like = self._like[name]
            if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.is_meta:
                return name
        one = {name: torch.empty_like(like[0], device="cpu") for name, like in self._like.items()}
        for expert in range(self.num_experts) if given else ():
            self._file.read(expert, one)
            for name, tensor in given.items():
                held = one[name].flatten().view(torch.uint8)
                if not torch.equal(
                    tensor[expert].cpu().contiguous().flatten().view(torch.uint8), held
                ):
                    return name
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedExperts:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared = ("_file", "_like", "_trace")
        own = ("_residents", "_stream")
        for name, value in self.__dict__.items():
            if name not in own:
                copied.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        copied._connect()
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "OffloadedExperts: a module must be pickled before its experts are offloaded, got one "
            "whose experts are in a file"
        )


def _share(part: int, rest: int) -> float:
    total = part + rest
    return part / total if total else float("nan")
