"""What ARCHITECTURE.md says of files and rooms is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchmoe import ops

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
ROOMS = TEXT.partition("\n## Rooms\n")[2].partition("\n## ")[0].partition("\nOne op")[0]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "torchmoe"

# Where a path of the text may begin.
BASES = (ROOT, CSRC, PACKAGE, PACKAGE / "nn")
# The folders at the top, as the source archive has them.
FOLDERS = [*re.findall(r"^graft (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.M), "python"]
# Files of the package that are no room: its front, and what the build writes.
FRONT = {"__init__.py", "__main__.py", "_build.py"}

# An entry of the rooms: names at an indent, then two blanks and what they are.
ENTRY = re.compile(r"^( +)((?:[^\s,]+, )*[^\s,]+(?:\{[^}]*\}\S*)?)(?:  +\S.*)?$")
# Descriptions begin further to the right than any name.
NAMES_END = 20


def paths_of_the_rooms() -> list[str]:
    """The files and folders that the rooms list, as paths from the root, X for an op."""
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in ROOMS.splitlines():
        entry = ENTRY.match(line)
        if entry is None or len(entry[1]) > NAMES_END:
            continue
        indent = len(entry[1])
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        folder = folders[-1][1] if folders else ""
        names = re.split(r", (?![^{]*\})", entry[2])
        paths += [folder + name for name in names]
        if names[-1].endswith("/"):
            folders.append((indent, paths[-1]))
    return paths


def spread(path: str) -> list[str]:
    """a.{h,cpp} is a.h and a.cpp."""
    before, brace, rest = path.partition("{")
    if not brace:
        return [path]
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in choices.split(",")]


def ops_of_the_library() -> set[str]:
    schemas = (CSRC / "library.cpp").read_text()
    return set(re.findall(r'm\.def\(\s*"([a-z]\w*)\(', schemas))


def sources(*folders: str) -> list[Path]:
    found = [path for name in folders for path in (CSRC / name).rglob("*") if path.is_file()]
    assert found
    return found


def included(source: Path) -> set[str]:
    return set(re.findall(r'^#include ["<]([^">]+)[">]', source.read_text(), flags=re.M))


# --- files ----------------------------------------------------------------------------------------


def test_the_rooms_exist() -> None:
    paths = paths_of_the_rooms()
    assert len(paths) > 60
    for path in paths:
        for one in spread(path):
            found = list(ROOT.glob(one.rstrip("/").replace("X", "gate_weights")))
            assert found, path
            assert all(place.is_dir() for place in found) == one.endswith("/"), path


def test_every_folder_at_the_top_is_a_room() -> None:
    named = {path.split("/")[0] for path in paths_of_the_rooms() if "/" in path}
    assert named == set(FOLDERS)


def test_every_folder_of_the_library_is_a_room() -> None:
    rooms = {path.removeprefix("csrc/").split("/")[0] for path in paths_of_the_rooms()}
    for folder in CSRC.iterdir():
        # testing/ holds the parts of testing.h, in whose line it is.
        named = folder.name in rooms or f"{folder.name}/ holds its parts" in ROOMS
        assert named or not folder.is_dir(), folder.name


def test_the_files_that_descriptions_name_exist() -> None:
    names = set(re.findall(r"[\w/]+\.(?:py|cpp|h|cu|cmake)\b(?!\.\w)", ROOMS))
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {
        path.name for path in ROOT.iterdir()
    }
    assert len(names) > 60
    for name in names:
        assert name.rpartition("/")[2] in files or "X" in name, name


@pytest.mark.parametrize("folder", [".", "testing", "testing/certify"])
def test_every_file_of_a_room_of_the_package_is_named(folder: str) -> None:
    inside = {path.name for path in (PACKAGE / folder).glob("*.py")} - FRONT
    assert inside
    assert inside <= set(re.findall(r"\b_?\w+\.py\b", ROOMS))


def test_the_files_of_the_layer() -> None:
    room = TEXT[TEXT.rindex("\n      nn/ ") : TEXT.index("\n      monitor/ ")]
    named = set(re.findall(r"\b_?\w+\.py\b", room))
    folder = PACKAGE / "nn"
    inside = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    shared = {
        path.name
        for name in ("estimators", "routers")
        for path in (folder / name).glob("_[!_]*.py")
    }
    shared |= {"estimator.py", "registry.py", "context_router.py"}
    assert named == inside | shared


def test_the_paths_that_the_text_names() -> None:
    """Whole, or as they lie in csrc, in the package or in its layer; X is an op."""
    paths = re.findall(r"`([\w/]+/[\w.]*)`", TEXT)
    assert len(paths) > 20
    for path in paths:
        name = path.replace("X", "gate_weights")
        assert any((base / name).exists() for base in BASES), path


# --- rules of the rooms ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("cpu", ("cuda/", "autograd/")),
        ("cuda", ("cpu/", "autograd/")),
        ("autograd", ("cpu/", "cuda/")),
    ],
)
def test_rooms_that_never_include_each_other(room: str, others: tuple[str, ...]) -> None:
    for source in sources(room):
        assert not [name for name in included(source) if name.startswith(others)], source


def test_nothing_outside_the_tests_uses_a_reference() -> None:
    python = [path for name in ("python", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    for source in (*sources("."), *python):
        text = source.read_text()
        assert not re.search(r'#include "(?:\S*/)?reference\.h"', text), source
        assert not re.search(r"^(?:from|import) reference\b", text, flags=re.M), source


def test_one_op_has_one_name_in_every_room() -> None:
    names = ops_of_the_library()
    assert len(names) > 10
    for name in names:
        assert callable(getattr(ops, name))
        for path in (
            f"csrc/ops/{name}.h",
            f"csrc/ops/{name}.cpp",
            f"tests/cpp/ops/{name}_test.cpp",
            f"tests/python/ops/test_{name}.py",
        ):
            assert (ROOT / path).is_file(), path
    kernels = {
        room: {path.stem.removesuffix("_kernel") for path in (CSRC / room).glob("*_kernel.cpp")}
        for room in ("cpu", "cuda")
    }
    on_cpu_alone = {"cache_insert", "cache_lookup", "cache_signatures"}
    assert kernels["cpu"] - on_cpu_alone == kernels["cuda"] < names
    assert {path.stem.removesuffix("_kernel") for path in CSRC.glob("cuda/*_kernel.*")} < names


def test_every_kernel_calls_the_check_of_its_op() -> None:
    for source in [*CSRC.glob("cpu/*_kernel.cpp"), *CSRC.glob("cuda/*_kernel.cpp")]:
        assert f"check_{source.stem.removesuffix('_kernel')}" in source.read_text(), source


def test_only_three_differentiable_ops_have_no_backward_op() -> None:
    schemas = (CSRC / "library.cpp").read_text()
    differentiable = {path.stem for path in CSRC.glob("autograd/*.cpp")} & ops_of_the_library()
    without = {name for name in differentiable if f'"_{name}_backward(' not in schemas}
    assert without == {"scale_gradient", "attach_loss", "grouped_mlp"}


def test_a_cu_file_knows_no_tensor() -> None:
    """Nor does a header that it includes; of torch they have element types and the launch check."""
    kernels = list(CSRC.rglob("*.cu"))
    assert len(kernels) > 5
    seen: set[Path] = set()
    waiting = list(kernels)
    of_torch: set[str] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        assert not re.search(r"\bat::Tensor\b|\btorch::|#include <torch/", source.read_text())
        for name in included(source):
            places = [base / name for base in (CSRC, source.parent) if (base / name).is_file()]
            waiting += places[:1]
            if not places and name.startswith(("ATen/", "c10/", "torch/")):
                of_torch.add(name)
    assert of_torch == {
        "ATen/OpMathType.h",
        "c10/util/BFloat16.h",
        "c10/util/Half.h",
        "c10/util/Exception.h",
        "c10/cuda/CUDAException.h",
    }


def test_launch_h_is_the_one_place_that_launches() -> None:
    assert [path.name for path in sources("cuda") if "<<<" in path.read_text()] == ["launch.h"]


def test_no_cuda_kernel_uses_atomics() -> None:
    for source in sources("cuda"):
        assert not re.search(r"\batomic\w*\(|\bcuda::atomic|\bred\.global", source.read_text())


def test_ops_draw_nothing() -> None:
    for source in sources("ops", "cpu", "cuda", "autograd", "common"):
        assert not re.search(r"\bat::rand|\bGenerator\b|curand|\brand_like", source.read_text())
