"""The layout of a file of experts: what its header says, and where each expert lies.

The file is in the format of safetensors: the length of a header in 8 bytes, the header as JSON, and
the bytes of the tensors without gaps. The tensors are those of a stacked `torchmoe.nn.Experts`
under their own names, so that an expert is one contiguous slice of each. The header names, as
`__metadata__`, the version of this layout, the activation, and the SHA-256 of everything behind the
header. It is padded with spaces to whole pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmoe.nn import Experts
from torchmoe.offload.files import read_fully, whole_pages, window_of

VERSION = "1"  # of the layout; a reader of another one refuses the file
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit

_PREFIX = 8  # bytes of the header's length
_CODES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Matrix:
    """One tensor of the file."""

    shape: tuple[int, ...]  # [E, ...]
    dtype: torch.dtype
    offset: int  # of its first byte in the file

    @property
    def slice_bytes(self) -> int:
        """Of one expert."""
        elements = 1
        for size in self.shape[1:]:
            elements *= size
        return elements * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all experts."""
        return self.shape[0] * self.slice_bytes

    def at(self, expert: int) -> int:
        """Where an expert's slice begins in the file."""
        return self.offset + expert * self.slice_bytes


def tensors_of(experts: Experts) -> dict[str, Tensor]:
    """The parameters by name, in the order of the file."""
    in_name = experts._in_name
    names = (in_name, in_name + "_bias", "down_proj", "down_proj_bias")
    return {name: tensor for name in names if (tensor := getattr(experts, name)) is not None}


def layout_of(owner: str, experts: Experts, begin: int) -> dict[str, Matrix]:
    """Where the tensors lie in a file whose header ends at `begin`."""
    matrices: dict[str, Matrix] = {}
    for name, tensor in tensors_of(experts).items():
        if tensor.dtype not in _CODES:
            raise RuntimeError(
                f"{owner}: experts must be of float32, float64, bfloat16 or float16, "
                f"got {name} of {tensor.dtype}"
            )
        if tensor.dtype != experts.down_proj.dtype:
            raise RuntimeError(
                f"{owner}: experts must be of one dtype, got {name} of {tensor.dtype} and "
                f"down_proj of {experts.down_proj.dtype}"
            )
        matrices[name] = Matrix(tuple(tensor.shape), tensor.dtype, begin)
        begin += matrices[name].num_bytes
    return matrices


def stored_sizes(owner: str, experts: Experts) -> tuple[int, int]:
    """The expert_bytes and window_bytes that a store of these experts has, see `ExpertStore`."""
    return sizes_of(layout_of(owner, experts, 0))


def sizes_of(matrices: dict[str, Matrix]) -> tuple[int, int]:
    """The bytes of one expert, and those in the page cache while one thread reads it."""
    sizes = [matrix.slice_bytes for matrix in matrices.values()]
    return sum(sizes), window_of(sizes)


def header_of(experts: Experts, sha256: str) -> bytes:
    """The file up to its data; as long for one SHA-256 as for another."""
    content: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",  # what Transformers asks of a file
            "torchmoe.offload": VERSION,
            "activation": experts.activation,
            "sha256": sha256,
        }
    }
    for name, matrix in layout_of("write_store", experts, 0).items():
        content[name] = {
            "dtype": _CODES[matrix.dtype],
            "shape": list(matrix.shape),
            "data_offsets": [matrix.offset, matrix.offset + matrix.num_bytes],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text = text.ljust(whole_pages(_PREFIX + len(text)) - _PREFIX)
    return len(text).to_bytes(_PREFIX, "little") + text


def read_header(path: str, number: int, size: int) -> tuple[dict[str, Any], int]:
    """The header's content and where the data begins; raises ValueError if there is none."""
    not_one = f"offload: store must be a file of safetensors, got {path}"
    prefix = bytearray(_PREFIX)
    if size < _PREFIX or not read_fully(number, 0, memoryview(prefix)):
        raise ValueError(f"{not_one} of {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(LONGEST_HEADER, size - _PREFIX):
        raise ValueError(f"{not_one} of {size} bytes with a header of {length} bytes")
    text = bytearray(length)
    if not read_fully(number, _PREFIX, memoryview(text)):
        raise ValueError(f"{not_one}, which ends within its header")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{not_one}, whose header is not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{not_one}, whose header is not a JSON object")
    return content, _PREFIX + length


def read_layout(
    path: str,
    header: dict[str, Any],
    begin: int,
    size: int,
    experts: Experts,
    expected: dict[str, Matrix],
) -> dict[str, Matrix]:
    """Where the tensors lie; raises ValueError unless the header describes these experts."""
    metadata = header.get("__metadata__")
    version = metadata.get("torchmoe.offload") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or version is None:
        raise ValueError(
            f"offload: store must be written by offload or write_store, got {path}, whose header "
            "does not say so"
        )
    if version != VERSION:
        raise ValueError(
            f"offload: store must be of version {VERSION}, got {path} of version {version}"
        )
    if metadata.get("activation") != experts.activation:
        raise ValueError(
            f"offload: store must be of experts with the activation {experts.activation}, "
            f"got {path} with {metadata.get('activation')}"
        )
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if found.keys() != expected.keys():
        raise ValueError(
            f"offload: store must have the tensors {', '.join(expected)}, got {path} with "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    matrices: dict[str, Matrix] = {}
    for name, matrix in expected.items():
        entry = found[name] if isinstance(found[name], dict) else {}
        wanted = {"dtype": _CODES[matrix.dtype], "shape": list(matrix.shape)}
        for key, value in wanted.items():
            if entry.get(key) != value:
                raise ValueError(
                    f"offload: store must have {name} of {key} {value}, got {path} with "
                    f"{entry.get(key)}"
                )
        matrices[name] = Matrix(matrix.shape, matrix.dtype, _begin_of(path, name, matrix, entry))
    # Sorted by where they begin, each ends where the next one begins: no gap and no overlap.
    end = 0
    for name, matrix in sorted(matrices.items(), key=lambda item: item[1].offset):
        if matrix.offset != end:
            raise ValueError(
                f"offload: store must have tensors side by side, got {path} with {name} at "
                f"{matrix.offset} of its data instead of {end}"
            )
        end += matrix.num_bytes
    if begin + end != size:
        raise ValueError(
            f"offload: store must have {begin + end} bytes, as its header says, got {path} of "
            f"{size} bytes"
        )
    return {
        name: Matrix(matrix.shape, matrix.dtype, begin + matrix.offset)
        for name, matrix in matrices.items()
    }


def _begin_of(path: str, name: str, matrix: Matrix, entry: dict[str, Any]) -> int:
    """Where a tensor begins in the data; raises ValueError unless it has the matrix's bytes."""
    offsets = entry.get("data_offsets")
    is_pair = isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int]
    begin, end = offsets if is_pair and offsets else (0, -1)
    if end - begin != matrix.num_bytes:
        raise ValueError(
            f"offload: store must have {matrix.num_bytes} bytes of {name}, got {path} with the "
            f"offsets {offsets}"
        )
    return begin
