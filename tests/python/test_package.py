"""Loading the package, and what it says when it cannot be loaded."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchmoe
from torchmoe import _library

PACKAGE = Path(torchmoe.__file__).parent


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python, with `path` in front of everything else it imports from."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else ""
    return subprocess.run(
        [sys.executable, *arguments[:-1], code + arguments[-1]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package's Python files, without anything compiled."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "torchmoe",
        ignore=lambda folder, names: {
            name
            for name in names
            if not name.endswith(".py") and not (Path(folder) / name / "__init__.py").is_file()
        },
    )
    return tmp_path


def import_error(path: Path, *, before: str = "") -> str:
    """The last line of what `import torchmoe` says where it cannot."""
    result = run("-c", f"{before}import torchmoe", path=path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torchmoe cannot load ")
    assert str(path / "torchmoe" / "libtorchmoe.so") in last
    return last


def blames_torch(message: str, built_for: str) -> bool:
    """Whether it names both versions of torch and the command."""
    return (
        f"it was built for torch {built_for} and this is torch {torch.__version__}" in message
        and "`pip install --no-build-isolation .`" in message
    )


def test_build_info() -> None:
    info = torchmoe.build_info()
    keys = {"torchmoe", "torch", "compiler", "cuda", "openmp", "git_revision"}
    assert info.keys() == keys
    assert all(isinstance(value, str) and value for value in info.values())
    assert info["torchmoe"] == torchmoe.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", torchmoe.__version__)
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    info["torch"] = "changed"
    assert torchmoe.build_info()["torch"] != "changed"


def test_version_file() -> None:
    version = Path(__file__).parents[2] / "VERSION.txt"
    assert torchmoe.__version__ == version.read_text().strip()


def test_the_library_lies_in_the_package() -> None:
    assert (PACKAGE / "libtorchmoe.so").is_file()
    assert (PACKAGE / "py.typed").is_file()
    assert torchmoe.cmake_prefix_path == str(PACKAGE / "share" / "cmake")


def test_the_public_names_are_there() -> None:
    for module in (torchmoe, torchmoe.nn, torchmoe.testing):
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name)


def test_importing_loads_nothing_but_torch() -> None:
    """What only monitors, examples and peers need is theirs to load, and there need be none of it.

    Nor is anything loaded of torch that takes long and that torch leaves to those who need it.
    """
    optional = [
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
        "transformers",
    ]
    code = f"""
import sys
import warnings
warnings.simplefilter("ignore")  # torch's, that there is no numpy
sys.modules |= dict.fromkeys({optional})
import torch
before = set(sys.modules)
import torchmoe
moe = torchmoe.nn.MoE(4, 4, 2, 1)
moe.update(moe(torch.randn(3, 4)).routing)
loaded = {{".".join(name.split(".")[:3]) for name in set(sys.modules) - before}}
own = {{"torchmoe", *sys.stdlib_module_names}}
print(sorted(name for name in loaded if name.split(".")[0] not in own))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    foreign = set(ast.literal_eval(result.stdout))
    assert not {name for name in foreign if name.split(".")[0] != "torch"}
    slow = {
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.tensor",
        "torch.utils.tensorboard",
    }
    assert not foreign & slow


def test_main_prints_the_build_information() -> None:
    result = run("-m", "torchmoe")
    assert result.returncode == 0, result.stderr
    info = torchmoe.build_info()
    facts = [torchmoe.__version__, torch.__version__, str(PACKAGE / "libtorchmoe.so")]
    facts += [info["git_revision"], info["compiler"], info["openmp"], info["cuda"], info["torch"]]
    for fact in (*facts, sys.version.split()[0]):
        assert fact in result.stdout


def test_missing_library(bare: Path) -> None:
    message = import_error(bare)
    assert "there is no such file" in message
    assert blames_torch(message, torchmoe.build_info()["torch"])


def test_broken_library(bare: Path) -> None:
    (bare / "torchmoe" / "libtorchmoe.so").write_text("not a library")
    message = import_error(bare)
    assert "invalid ELF header" in message or "file too short" in message
    assert blames_torch(message, torchmoe.build_info()["torch"])


@pytest.mark.parametrize("version", ["2.1.0", "99.0.0+cu130"])
def test_library_for_another_torch(bare: Path, version: str) -> None:
    (bare / "torchmoe" / "_build.py").write_text(f'INFO = {{"torch": "{version}"}}\n')
    # The library is there and would load; the versions alone must be enough to refuse it.
    shutil.copy(PACKAGE / "libtorchmoe.so", bare / "torchmoe")
    message = import_error(bare)
    assert "the versions of torch differ" in message
    assert blames_torch(message, version)


def test_another_patch_release_of_torch_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    info = {**torchmoe.build_info(), "torch": f"{minor}.99+cu130"}
    monkeypatch.setattr(_library, "build_info", lambda: info)
    assert _library.load()["torchmoe"] == torchmoe.__version__


def test_not_built(bare: Path) -> None:
    (bare / "torchmoe" / "_build.py").unlink()
    assert "the package has not been built" in import_error(bare)


@pytest.mark.parametrize("replaced", [False, True], ids=["beside", "replaced"])
def test_a_second_copy_in_one_process(bare: Path, replaced: bool) -> None:
    other = bare / "other" / "libtorchmoe.so"
    other.parent.mkdir()
    for copy in (other, bare / "torchmoe" / "libtorchmoe.so"):
        shutil.copy(PACKAGE / "libtorchmoe.so", copy)
    before = f"import os, torch; torch.ops.load_library({str(other)!r}); "
    if replaced:
        before += f"os.unlink({str(other)!r}); "
    message = import_error(bare, before=before)
    assert f"this process has loaded another copy, {other}" in message
    assert "pip install" not in message


@pytest.mark.parametrize("missing", ["library", "build", "torch"])
def test_main_reports_what_cannot_be_imported(bare: Path, missing: str) -> None:
    problem = "there is no such file"
    if missing == "build":
        (bare / "torchmoe" / "_build.py").unlink()
        problem = "the package has not been built"
    if missing == "torch":
        problem = "libcudart.so.13: cannot open shared object file"
        (bare / "torch").mkdir()
        (bare / "torch" / "__init__.py").write_text(f"raise ImportError({problem!r})\n")
    result = subprocess.run(
        [sys.executable, "-m", "torchmoe"],
        cwd=bare,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert problem in result.stdout.splitlines()[-1]
    facts = [str(bare / "torchmoe" / "libtorchmoe.so"), sys.version.split()[0], sys.executable]
    facts += ["not built" if missing == "build" else torchmoe.build_info()["compiler"]]
    facts += [str((bare if missing == "torch" else Path(torch.__file__).parents[1]) / "torch")]
    for fact in facts:
        assert fact in result.stdout
