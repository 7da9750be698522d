"""The tensors in which a `RoutingCache` keeps its entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmoe import ops
from torchmoe._checks import check_tensor
from torchmoe._wide import wide_dtype

# Bits of a signature: keys that are not alike share one by chance once in 65,536 pairs.
_BITS = 16
# Each table is a further chance for a similar key to share one, and costs _BITS products a row.
_MOST_TABLES = 16


class EntryTable:
    """The tensors of the entries.

    They are no buffers, which frameworks average, cast and broadcast: a key that has changed by
    itself would find the ids of another one.
    """

    TENSORS = ("keys", "key_signatures", "planes", "last_used", "uses", "ids", "weights")
    SAVED = (*TENSORS, "dtype")

    def __init__(self, *, dtype: torch.dtype, **tensors: Tensor) -> None:
        self.dtype = dtype  # of the gate inputs; the keys' is wider
        self.keys = tensors["keys"]  # [M, G]
        self.key_signatures = tensors["key_signatures"]  # [M, L]
        self.planes = tensors["planes"]  # [L, B, G]
        self.last_used = tensors["last_used"]  # [M]
        self.uses = tensors["uses"]  # [M]
        self.ids = tensors["ids"]  # [M, K]
        self.weights = tensors["weights"]  # [M, K]
        self.sort()

    @classmethod
    def like(cls, gate_input: Tensor, size: int, top_k: int, similarity: float) -> EntryTable:
        """An empty table for such gate inputs."""
        width, dtype = gate_input.shape[1], wide_dtype(gate_input.dtype)
        num_tables = _num_tables(similarity)
        # Of its own: that two layers have the same planes does no harm, and that a cache changes
        # what the model draws would.
        generator = torch.Generator().manual_seed(0)
        whole = torch.zeros(size, dtype=torch.int64)
        return cls(
            dtype=gate_input.dtype,
            keys=torch.zeros(size, width, dtype=dtype),
            key_signatures=torch.full((size, num_tables), -1),
            planes=torch.randn(num_tables, _BITS, width, generator=generator, dtype=dtype),
            last_used=whole,
            uses=whole.clone(),
            ids=torch.full((size, top_k), -1),
            weights=torch.zeros(size, top_k, dtype=dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, without the order, which follows from the signatures."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def saved(self) -> dict[str, Any]:
        """Copies under the names of SAVED."""
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return {**copies, "dtype": self.dtype}

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any], size: int, top_k: int | None) -> EntryTable:
        """The table that was saved, among other things.

        Args:
            saved: has all names of SAVED.
            size: M.
            top_k: K, or None if any will do.

        Raises:
            TypeError: what should be a tensor is none.
            ValueError: a tensor has another shape or dtype than in a table of that size.
        """
        tensors = {name: saved[name] for name in cls.TENSORS}
        _check_saved(tensors, size, top_k)
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return cls(dtype=saved["dtype"], **copies)

    def of(self, entry: Tensor, values: Tensor, missing: float) -> Tensor:
        """The rows of values [M, K] that belong to entries [N]; `missing` where there is none."""
        return values[entry.clamp(min=0)].masked_fill((entry < 0).unsqueeze(1), missing)

    def sort(self) -> None:
        """Puts the entries of each table in the order in which they are looked up."""
        self.order = self.key_signatures.t().sort(stable=True).indices

    def takes(self, gate_input: Tensor) -> bool:
        """Whether the gate inputs are of the size and dtype of the entries'."""
        return gate_input.shape[1:] == self.keys.shape[1:] and gate_input.dtype == self.dtype

    def is_taken(self) -> Tensor:
        """[M] bool."""
        return self.key_signatures[:, 0] >= 0

    @property
    def entries(self) -> ops.CacheTable:
        """What the ops look at."""
        return ops.CacheTable(self.keys, self.key_signatures)


def _check_saved(tensors: dict[str, Tensor], size: int, top_k: int | None) -> None:
    """Raises unless tensors that were saved make a table of that size."""
    for name, tensor in tensors.items():
        check_tensor("RoutingCache", f'state_dict["{name}"]', tensor)
    keys, ids, of_keys = tensors["keys"], tensors["ids"], tensors["key_signatures"]
    width, dtype = keys.shape[-1:], keys.dtype
    num_tables = of_keys.shape[-1:]
    columns = ids.shape[-1:] if top_k is None else (top_k,)
    whole = torch.int64
    for name, shape, kind in (
        ("keys", (size, *width), wide_dtype(dtype)),
        ("key_signatures", (size, *num_tables), whole),
        ("planes", (*num_tables, _BITS, *width), dtype),
        ("last_used", (size,), whole),
        ("uses", (size,), whole),
        ("ids", (size, *columns), whole),
        ("weights", (size, *columns), dtype),
    ):
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != kind:
            raise ValueError(
                f'RoutingCache: state_dict["{name}"] must be {kind} of shape {list(shape)}, '
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )


def _num_tables(similarity: float) -> int:
    """As many as let half of the gate inputs at that very cosine find the key, at least two.

    One table finds it with probability (1 - angle / pi) ^ bits.
    """
    one = (1 - math.acos(similarity) / math.pi) ** _BITS
    enough = 1 if one > 0.5 else math.ceil(math.log(0.5) / math.log1p(-one))
    return min(max(2, enough), _MOST_TABLES)
