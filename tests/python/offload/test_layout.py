"""Files whose header is not that of the experts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stored import INNER, E, H, check_reads, made
from torchmoe.nn import Experts
from torchmoe.offload.store import ExpertStore


def changed_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode().ljust(end - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def swap(header: dict[str, Any]) -> None:
    """Two tensors of one shape would be exchanged; here they overlap instead."""
    header["down_proj"]["data_offsets"] = [
        offset - 4 for offset in header["down_proj"]["data_offsets"]
    ]


BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no metadata": (
        lambda header: header.pop("__metadata__"),
        "must be written by offload or write_store, got {path}, whose header does not say so",
    ),
    "metadata of another kind": (
        lambda header: header.update(__metadata__="x"),
        "must be written by offload or write_store, got {path}, whose header does not say so",
    ),
    "another version": (
        lambda header: header["__metadata__"].update({"torchmoe.offload": "2"}),
        "must be of version 1, got {path} of version 2",
    ),
    "another activation": (
        lambda header: header["__metadata__"].update(activation="geglu"),
        "must be of experts with the activation swiglu, got {path} with geglu",
    ),
    "no SHA-256": (
        lambda header: header["__metadata__"].pop("sha256"),
        "must hold the data whose SHA-256 its header names, None, got {path} with [0-9a-f]{{64}}",
    ),
    "a tensor less": (
        lambda header: header.pop("down_proj_bias"),
        "must have the tensors gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias, "
        "got {path} with down_proj, gate_up_proj, gate_up_proj_bias",
    ),
    "an unknown tensor": (
        lambda header: header.update(x=header["down_proj"]),
        "must have the tensors gate_up_proj, .*, got {path} with .*, x",
    ),
    "another dtype": (
        lambda header: header["down_proj"].update(dtype="I32"),
        "must have down_proj of dtype F32, got {path} with I32",
    ),
    "another shape": (
        lambda header: header["down_proj"].update(shape=[E, INNER, H]),
        rf"must have down_proj of shape \[{E}, {H}, {INNER}\], got {{path}} with "
        rf"\[{E}, {INNER}, {H}\]",
    ),
    "no entry": (
        lambda header: header.update(down_proj=3),
        "must have down_proj of dtype F32, got {path} with None",
    ),
    "no offsets": (
        lambda header: header["down_proj"].pop("data_offsets"),
        f"must have {4 * E * H * INNER} bytes of down_proj, got {{path}} with the offsets None",
    ),
    "offsets of text": (
        lambda header: header["down_proj"].update(data_offsets=["0", "1"]),
        r"must have \d+ bytes of down_proj, got {path} with the offsets \['0', '1'\]",
    ),
    "too few bytes": (
        lambda header: header["down_proj"].update(data_offsets=[0, 8]),
        r"must have \d+ bytes of down_proj, got {path} with the offsets \[0, 8\]",
    ),
    "an overlap": (
        swap,
        r"must have tensors side by side, got {path} with down_proj at \d+ of its data "
        r"instead of \d+",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_HEADERS.values(), ids=list(BAD_HEADERS))
def test_a_header_that_does_not_fit(
    path: Path, experts: Experts, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed_header(path, change)
    expected = "offload: store " + message.format(path=re.escape(str(path)))
    with pytest.raises(ValueError, match=f"^{expected}$"):
        ExpertStore.open(path, experts)


def test_a_header_with_its_tensors_in_another_order_is_as_good(
    tmp_path: Path, path: Path, experts: Experts
) -> None:
    changed_header(path, lambda header: header.update(gate_up_proj=header.pop("gate_up_proj")))
    check_reads(ExpertStore.open(path, experts), experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": False}, "must have the tensors gate_up_proj, down_proj, got"),
        ({"activation": "relu"}, "must be of experts with the activation relu, got .* swiglu"),
        ({"activation": "reglu"}, "must be of experts with the activation reglu, got .* swiglu"),
        ({"dtype": torch.bfloat16}, "must have gate_up_proj of dtype BF16, got .* with F32"),
    ],
    ids=str,
)
def test_other_experts(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^offload: store {message}"):
        ExpertStore.open(path, made("meta", **({"bias": True} | options)))


def test_other_sizes(path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have gate_up_proj of shape \[6, 40, 24\], got"):
        ExpertStore.open(path, Experts(H, INNER, E + 1, bias=True, device="meta"))


NO_STORES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "of 0 bytes"),
    "short": (b"abc", "of 3 bytes"),
    "text": (b"what a fine day it is\n", r"of 22 bytes with a header of \d+ bytes"),
    "no JSON": (b"\2\0\0\0\0\0\0\0{x", "whose header is not JSON"),
    "not UTF-8": (b"\2\0\0\0\0\0\0\0\xff\xfe", "whose header is not JSON"),
    "no object": (b"\2\0\0\0\0\0\0\0[]", "whose header is not a JSON object"),
    "deep": ((200_000).to_bytes(8, "little") + 200_000 * b"[", "whose header is not JSON"),
}


@pytest.mark.parametrize(("content", "message"), NO_STORES.values(), ids=list(NO_STORES))
def test_a_file_of_another_kind(
    tmp_path: Path, experts: Experts, content: bytes, message: str
) -> None:
    file = tmp_path / "a"
    file.write_bytes(content)
    expected = rf"^offload: store must be a file of safetensors, got {file},? {message}$"
    with pytest.raises(ValueError, match=expected):
        ExpertStore.open(file, experts)
