"""The examples of docs/cpp.md compile, link and run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cpp_programs import build, output_of
from torchmoe.nn import MoE

pytestmark = [pytest.mark.needs_build, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "cpp.md").read_text()
(LISTS,) = re.findall(r"^```cmake\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
PROGRAM, *BLOCKS = re.findall(r"^```cpp\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
#: What stands outside of functions.
OUTSIDE = re.compile(r"struct |#include |at::Tensor \w+\(const")
#: What the text takes for granted.
AROUND = """\
#include <iostream>
#include <optional>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/torch.h>
#include <torchmoe/torchmoe.h>

using namespace torchmoe::nn;
"""
GIVEN = """\
  MoE moe(MoEOptions(64, 128, 8, 2));
  MoEOptions options(64, 128, 8, 2);
  c10::intrusive_ptr<c10d::ProcessGroup> group;
"""


def project(folder: Path, source: str) -> Path:
    """A program of the guide's own lists, built."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "main.cpp").write_text(source)
    return build(folder, folder / "build") / "program"


def test_the_first_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "warning" not in output_of(project(tmp_path / "first", PROGRAM)).lower()
    assert (tmp_path / "moe.safetensors").exists()


def test_every_other_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layer = MoE(64, 128, 8, 2)
    torch.save(layer.state_dict(), tmp_path / "python.safetensors")  # read by what it holds
    outside = [block for block in BLOCKS if OUTSIDE.match(block)]
    inside = [f"  {{\n{block}  }}\n" for block in BLOCKS if not OUTSIDE.match(block)]
    assert len(outside) >= 4
    assert len(inside) >= 5
    source = "\n".join([AROUND, *outside, "int main() {", GIVEN, *inside, "}"])
    printed = output_of(project(tmp_path / "others", source))
    assert "holds      gradients" in printed
    assert "FAILS" not in printed
    written = torch.load(tmp_path / "for_python.pt")
    assert written.keys() == layer.state_dict().keys()
    assert all(torch.equal(written[name], value) for name, value in layer.state_dict().items())
