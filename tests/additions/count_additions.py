"""Counts what an addition costs: the files that a small one of each kind touches, and sizes.

python tests/additions/count_additions.py [KIND ...] [--run] [--copies FOLDER]. A patch next to this
file adds a real estimator, router and so on, with its tests and its place in the documents. Each is
applied to a copy of the tracked files, as they are now. With --run what the copy needs is built,
and the tests that the addition brings run there. `make additions` does all of that.

CONTRIBUTING's lists "Adding an estimator" and so on name the files of these patches, which a test
compares; X stands for the name of what is added.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpp_functions import wide_functions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Kind:
    """A kind of addition, of which NAME.patch is an example."""

    name: str
    limit: int  # files that it may touch
    example: str  # what its patch adds, X in CONTRIBUTING
    tests: str  # arguments of pytest: the tests that cover it
    cpp_tests: str = ""  # Catch2's filter of the C++ ones; where there is one, the copy is built

    @property
    def patch(self) -> Path:
        """The patch."""
        return HERE / f"{self.name}.patch"

    @property
    def heading(self) -> str:
        """Its section of CONTRIBUTING."""
        article = "an" if self.name[0] in "aeio" else "a"
        return f"Adding {article} {self.name}"


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "estimator",
            4,
            "uniform_straight_through",
            "tests/python/nn tests/python/test_check_surrogate.py tests/python/test_scripting.py "
            "tests/python/test_compare_estimators.py tests/python/test_wrong_arguments.py "
            "tests/python/test_package.py "
            "-k 'uniform_straight_through or UniformStraightThrough or uniform_noise or public or "
            "architecture or leaves_out'",
        ),
        Kind(
            "router",
            5,
            "distance_router",
            "tests/python/nn/routers tests/python/nn/test_settings.py "
            "tests/python/test_snippets.py "
            "tests/python/test_scripting.py tests/python/test_wrong_arguments.py "
            "tests/python/test_package.py tests/python/studies/test_routers.py "
            "tests/python/studies/test_classification_model.py "
            "-k 'distance or Distance or public or gating or gates or causal_router or refuses'",
        ),
        Kind(
            "activation",
            4,
            "quick_gelu",
            "tests/python/ops/test_expert_mlp.py tests/python/ops/test_attach_dense_gradient.py "
            "tests/python/nn/test_experts.py tests/python/nn/test_cpp_parity.py "
            "-k 'quick_gelu or has_a_formula or errors'",
            cpp_tests="expert_mlp*,Experts*",
        ),
        Kind(
            "op",
            15,
            "squared_norms",
            "tests/python/ops/test_squared_norms.py tests/python/test_wrong_arguments.py "
            "tests/python/test_selective_checkpointing.py tests/python/test_package.py "
            "-k 'SquaredNorms or squared_norms or checklist or public'",
            cpp_tests="squared_norms*",
        ),
        Kind(
            "dtype",
            8,
            "float8",
            "tests/python/ops/test_float8.py",
            cpp_tests="~[cuda]",
        ),
    )
}


def git(*arguments: str, folder: Path) -> str:
    """What git prints in a folder, which it takes for no part of a repository around it."""
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def files_of(patch: Path) -> list[str]:
    """The files that a patch touches."""
    lines = git("apply", "--numstat", str(patch), folder=patch.parent).splitlines()
    return sorted(line.split("\t")[2] for line in lines)


def listed(kind: Kind) -> list[str]:
    """The files that CONTRIBUTING names for an addition of this kind."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition(f"\n## {kind.heading}\n")[2].partition("\n## ")[0]
    items = re.findall(r"^- ((?:`[^`]+`(?:, )?)+):", section, flags=re.MULTILINE)
    return sorted(path for item in items for path in re.findall(r"`([^`]+)`", item))


def copy_tracked(folder: Path) -> None:
    """Copies what git tracks or would, as it is now."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # and not deleted since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build(folder: Path, environment: dict[str, str]) -> None:
    """Builds the library in a copy, the C++ tests and the emulation."""
    configure = "cmake -S . -B build -DTORCHMOE_BUILD_TESTS=ON -DTORCHMOE_BUILD_EMULATION=ON"
    jobs = [sys.executable, str(ROOT / "cmake" / "build_jobs.py")]
    count = subprocess.run(jobs, check=True, capture_output=True, text=True).stdout.strip()
    for command in (
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        shlex.split(configure),
        ["cmake", "--build", "build", "-j", count],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def run_tests(kind: Kind, folder: Path) -> None:
    """Runs the tests that the addition brings, in its copy."""
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "python"),
        "CMAKE_ARGS": f"-DTORCHMOE_WERROR=ON {os.environ.get('CMAKE_ARGS', '')}",
    }
    package = folder / "python" / "torchmoe"
    if kind.cpp_tests:
        build(folder, environment)
        tests = str(folder / "build" / "tests" / "cpp" / "torchmoe_tests")
        subprocess.run([tests, *shlex.split(kind.cpp_tests)], cwd=folder, check=True)
    else:
        for name in ("libtorchmoe.so", "_build.py"):
            shutil.copy2(ROOT / "python" / "torchmoe" / name, package / name)
    check = f"import torchmoe; assert torchmoe.__file__.startswith({str(package)!r})"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not kind.cpp_tests:
        pytest += ["-m", "not cuda and not needs_build"]
    subprocess.run([*pytest, *shlex.split(kind.tests)], cwd=folder, env=environment, check=True)


def add(kind: Kind, folder: Path) -> None:
    """Makes a copy in the folder and applies the patch to it."""
    copy_tracked(folder)
    git("apply", str(kind.patch), folder=folder)


@dataclass(frozen=True)
class Size:
    """A number of this repository and how large it may be."""

    what: str
    found: int
    limit: int
    where: Sequence[str] = ()


def sizes() -> Iterator[Size]:
    """What the layer, the C++ signatures and the test files have grown to."""
    layer = ROOT / "python" / "torchmoe" / "nn" / "moe.py"
    text = layer.read_text()
    (moe,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == "MoE"
    )
    (init,) = (
        node for node in moe.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    arguments = init.args
    parameters = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1  # self
    yield Size("parameters of MoE.__init__", parameters, 17)
    yield Size("lines of MoE.__init__", (init.end_lineno or 0) - init.lineno + 1, 60)
    yield Size("lines of nn/moe.py", len(text.splitlines()), 350)
    wide = wide_functions(ROOT / "csrc", more_than=8)
    names = [f"{name} ({count}, {path})" for name, (count, path) in sorted(wide.items())]
    yield Size("C++ functions of more than 8 parameters", len(wide), 10, names)
    long = {
        str(path.relative_to(ROOT)): lines
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in sorted((ROOT / "tests").rglob(pattern))
        if (lines := len(path.read_text().splitlines())) > 500
    }
    yield Size(
        "test files of more than 500 lines", len(long), 0, [f"{p} ({n})" for p, n in long.items()]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 1 where a number is above its limit or a test fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default all)"
    )
    parser.add_argument("--run", action="store_true", help="build, and run the additions' tests")
    parser.add_argument(
        "--copies", type=Path, metavar="FOLDER", help="make the copies here and keep them"
    )
    options = parser.parse_args(arguments)
    for name in options.kinds:
        if name not in KINDS:
            parser.error(f"KIND must be one of {', '.join(KINDS)}, got {name}")
    chosen = [KINDS[name] for name in options.kinds or KINDS]
    ok = True
    with tempfile.TemporaryDirectory(prefix="torchmoe-additions-") as temporary:
        copies = (options.copies or Path(temporary)).resolve()
        print(f"{'an addition':44}{'files':>6}{'limit':>7}{'tests':>8}")
        for kind in chosen:
            folder = copies / kind.name
            folder.mkdir(parents=True)
            add(kind, folder)
            files, outcome = files_of(kind.patch), "-"
            if options.run:
                try:
                    run_tests(kind, folder)
                    outcome = "passed"
                except subprocess.CalledProcessError as error:
                    print(error, file=sys.stderr)
                    outcome = "failed"
            ok &= len(files) <= kind.limit and outcome != "failed"
            print(f"{kind.name + ' ' + kind.example:44}{len(files):6}{kind.limit:7}{outcome:>8}")
    print(f"\n{'size':44}{'is':>6}{'limit':>7}")
    for size in sizes():
        ok &= size.found <= size.limit
        print(f"{size.what:44}{size.found:6}{size.limit:7}")
        if size.found > size.limit:
            print(*(f"  {one}" for one in size.where), sep="\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
