"""find_package(torchmoe) on what does not fit the library: one sentence, and nothing around it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import torchmoe

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(torchmoe.__file__).resolve().parent
MINOR = ".".join(torch.__version__.split(".")[:2])
NEW_ABI, OLD_ABI = "_GLIBCXX_USE_CXX11_ABI=1", "_GLIBCXX_USE_CXX11_ABI=0"
NO_TOOLKIT = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"


def installed(folder: Path, **values: str) -> Path:
    """A copy of the package's CMake files, with other values of what it was built with."""
    (folder / "include").mkdir(parents=True)
    shutil.copytree(PACKAGE / "share", folder / "share")
    shutil.copy(PACKAGE / "libtorchmoe.so", folder)
    config = folder / "share" / "cmake" / "torchmoe" / "torchmoeConfig.cmake"
    text = config.read_text()
    for name, value in values.items():
        text, count = re.subn(rf'(?m)^set\({name} "?[^")]*"?\)', f'set({name} "{value}")', text)
        assert count == 1, name
    config.write_text(text)
    return folder


def fake_torch(
    folder: Path,
    version: str = f"{MINOR}.0",
    flags: str = "",
    libraries: tuple[str, ...] = ("c10", "torch_cpu"),
) -> Path:
    """The files of a torch that configuring looks at."""
    cmake = folder / "share" / "cmake" / "Torch"
    cmake.mkdir(parents=True)
    # What find_package(Torch) would say of a machine without the toolkit.
    config = 'message(FATAL_ERROR "pages of text")\n'
    (cmake / "TorchConfig.cmake").write_text(f'set(TORCH_CXX_FLAGS "{flags}")\n{config}')
    (cmake / "TorchConfigVersion.cmake").write_text(f'set(PACKAGE_VERSION "{version}")\n')
    (folder / "include" / "torch" / "csrc" / "api" / "include").mkdir(parents=True)
    (folder / "lib").mkdir()
    for library in libraries:
        (folder / "lib" / f"lib{library}.so").touch()
    return folder


CUDA_LIBRARIES = ("c10", "torch_cpu", "c10_cuda", "torch_cuda")


@dataclass
class Mistake:
    """What a consumer gave, and the sentence about it, without `torchmoe: `."""

    sentence: str
    package: Path = PACKAGE
    torch: Path | None = None
    arguments: list[str] = field(default_factory=list)
    languages: str = "CXX"
    before: str = ""


Maker = Callable[[Path], Mistake]


def no_torch(_: Path) -> Mistake:
    return Mistake(
        f'CMAKE_PREFIX_PATH must lead to torch, got "{PACKAGE}/share/cmake;/nowhere": add to it '
        "the output of python -c 'import torch; print(torch.utils.cmake_prefix_path)'",
        torch=Path("/nowhere"),
    )


def of_torch(must: str, folder: Path) -> str:
    """The form of what is wrong with a torch."""
    return (
        f"torch must {must} in {folder}: put such a torch first on CMAKE_PREFIX_PATH, "
        "or build torchmoe again with this one"
    )


def another_version(folder: Path) -> Mistake:
    other = fake_torch(folder / "torch", version="2.1.5")
    must = f"be {MINOR}, which torchmoe was built for, got 2.1.5"
    return Mistake(of_torch(must, other), torch=other)


def no_shared_libraries(folder: Path) -> Mistake:
    other = fake_torch(folder / "torch", libraries=("c10",))
    return Mistake(
        f"torch must have its shared libraries in {other}/lib, got no libtorch_cpu.so there: "
        "put first on CMAKE_PREFIX_PATH a torch as pip installs it",
        torch=other,
    )


def torch_of_another_abi(folder: Path) -> Mistake:
    other = fake_torch(folder / "torch", flags=f"-D{OLD_ABI}")
    return Mistake(of_torch(f"have {NEW_ABI}, as torchmoe has, got {OLD_ABI}", other), torch=other)


def of_the_flags(got: str, remedy: str, wanted: str = NEW_ABI) -> str:
    return (
        f"the C++ compiler with its flags must have {wanted} as torchmoe's had, got {got}: {remedy}"
    )


def flags_of_another_abi(_: Path) -> Mistake:
    sentence = of_the_flags(OLD_ABI, f"take -D{OLD_ABI} out of the flags")
    return Mistake(sentence, arguments=[f"-DCMAKE_CXX_FLAGS=-D{OLD_ABI}"])


def definitions_of_another_abi(_: Path) -> Mistake:
    sentence = of_the_flags(OLD_ABI, f"take -D{OLD_ABI} out of the flags")
    others = 'NAME="a b" $<TARGET_PROPERTY:none,TYPE>'
    return Mistake(sentence, before=f"add_compile_definitions({OLD_ABI} {others})")


def options_of_another_abi(_: Path) -> Mistake:
    sentence = of_the_flags(OLD_ABI, f"take -D{OLD_ABI} out of the flags")
    before = f"add_compile_options(-include generated.h -D{OLD_ABI})"
    return Mistake(sentence, before=before)


def flags_for_a_library_of_the_old_abi(folder: Path) -> Mistake:
    return Mistake(
        of_the_flags(NEW_ABI, f"add -D{OLD_ABI} to CMAKE_CXX_FLAGS", wanted=OLD_ABI),
        package=installed(folder / "package", TORCHMOE_ABI=OLD_ABI),
    )


def checked_containers(_: Path) -> Mistake:
    return Mistake(
        of_the_flags("_GLIBCXX_DEBUG", "take -D_GLIBCXX_DEBUG out of the flags"),
        arguments=["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-g -D_GLIBCXX_DEBUG"],
    )


def another_standard_library(_: Path) -> Mistake:
    """The macro is libc++'s own: GCC has no such flag."""
    return Mistake(
        of_the_flags("libc++", "take -stdlib=libc++ out of the flags"),
        arguments=["-DCMAKE_CXX_FLAGS=-D_LIBCPP_VERSION=1"],
    )


def another_processor(folder: Path) -> Mistake:
    other, this = "aarch64", "x86_64"
    if os.uname().machine == other:
        other, this = this, other
    return Mistake(
        f"the C++ compiler must make code for {other} as torchmoe's did, got {this}: "
        f"take a torchmoe that is built for {this}, or another compiler",
        package=installed(folder / "package", TORCHMOE_CPU=other),
    )


def old_compiler(folder: Path) -> Mistake:
    """One that takes every standard for C++17."""
    compiler = folder / "old"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -std=c++17\n')
    compiler.chmod(0o755)
    command = ["g++", "-dumpfullversion", "-dumpversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=True)
    return Mistake(
        "the C++ compiler with its flags must compile C++20, got an older C++ of "
        f"GNU {version.stdout.strip()}: take -std= out of the flags, "
        "or set CMAKE_CXX_COMPILER to GCC 12 or clang 16 or later",
        arguments=[f"-DCMAKE_CXX_COMPILER={compiler}"],
    )


def no_cxx(_: Path) -> Mistake:
    return Mistake(
        'the project must enable CXX before find_package(torchmoe), got "C": '
        "write project(name LANGUAGES CXX)",
        languages="C",
    )


def torch_without_cuda(folder: Path) -> Mistake:
    other = fake_torch(folder / "torch")
    return Mistake(
        of_torch("be a build with CUDA, as torchmoe is, got one without", other),
        package=installed(folder / "package", TORCHMOE_CUDA="ON"),
        torch=other,
    )


def torch_of_another_cuda(folder: Path) -> Mistake:
    other = fake_torch(folder / "torch", libraries=CUDA_LIBRARIES)
    needed = b"\x7fELF\0libc10.so\0libcudart.so.12\0libc.so.6\0"
    (other / "lib" / "libc10_cuda.so").write_bytes(needed)
    return Mistake(
        of_torch("be a build for CUDA 13, as torchmoe is, got one for CUDA 12", other),
        package=installed(folder / "package", TORCHMOE_CUDA="ON", TORCHMOE_CUDA_MAJOR="13"),
        torch=other,
    )


def of_the_toolkit(got: str) -> str:
    return (
        "the machine must have a whole CUDA toolkit, since torchmoe is built with CUDA, "
        f"got {got}: install it, or name its folder in the environment's CUDA_PATH"
    )


def no_toolkit(folder: Path) -> Mistake:
    return Mistake(
        of_the_toolkit("no CUDA toolkit"),
        package=installed(folder / "package", TORCHMOE_CUDA="ON"),
        torch=fake_torch(folder / "torch", libraries=CUDA_LIBRARIES),
        arguments=[NO_TOOLKIT],
    )


def part_of_a_toolkit(folder: Path) -> Mistake:
    modules = folder / "modules"
    modules.mkdir()
    (modules / "FindCUDAToolkit.cmake").write_text(
        'message(STATUS "found threads")\n'  # CMake's own says such things even when quiet
        "set(CUDAToolkit_FOUND ON)\n"
        "set(CUDAToolkit_TARGET_DIR /opt/cuda)\n"
        "set(CUDAToolkit_NVCC_EXECUTABLE ${CMAKE_CURRENT_LIST_FILE})\n"
        "foreach(name cudart cufft nvrtc)\n"
        "  add_library(CUDA::${name} INTERFACE IMPORTED)\n"
        "endforeach()\n"
    )
    return Mistake(
        of_the_toolkit("a CUDA toolkit in /opt/cuda without cublas curand"),
        package=installed(folder / "package", TORCHMOE_CUDA="ON"),
        torch=fake_torch(folder / "torch", libraries=CUDA_LIBRARIES),
        arguments=[f"-DCMAKE_MODULE_PATH={modules}"],
    )


MISTAKES = [
    no_torch,
    another_version,
    no_shared_libraries,
    torch_of_another_abi,
    flags_of_another_abi,
    definitions_of_another_abi,
    options_of_another_abi,
    flags_for_a_library_of_the_old_abi,
    checked_containers,
    another_standard_library,
    another_processor,
    old_compiler,
    no_cxx,
    torch_without_cuda,
    torch_of_another_cuda,
    no_toolkit,
    part_of_a_toolkit,
]


def configured(
    folder: Path, mistake: Mistake, how: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """CMake's run on a consumer; what it prints of the compilers is left out."""
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source" / "main.cpp").touch()
    lines = [
        "cmake_minimum_required(VERSION 3.24)",
        f"project(consumer LANGUAGES {mistake.languages})",
        mistake.before,
        'message(STATUS "before")',
        f"find_package(torchmoe {how})",
        'message(STATUS "found <${torchmoe_FOUND}>")',
        "if(torchmoe_FOUND)",
        "  add_executable(program main.cpp)",
        "  target_link_libraries(program PRIVATE torchmoe::torchmoe)",
        "endif()",
    ]
    (folder / "source" / "CMakeLists.txt").write_text("\n".join(lines))
    prefixes = [mistake.package / "share" / "cmake", mistake.torch or torch.utils.cmake_prefix_path]
    unset = ("CMAKE_PREFIX_PATH", "CXXFLAGS", "CXX", "Torch_ROOT", "torchmoe_ROOT")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [
            "cmake",
            f"-S{folder / 'source'}",
            f"-B{folder / 'build'}",
            f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}",
            *mistake.arguments,
        ],
        env={**kept, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    done.stdout = done.stdout[done.stdout.index("-- before\n") :]
    return done


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("make", MISTAKES)
class TestAMistake:
    def test_is_told_in_one_sentence(self, make: Maker, tmp_path: Path) -> None:
        mistake = make(tmp_path)
        done = configured(tmp_path, mistake, "REQUIRED")
        assert done.returncode == 1, done.stdout
        config = mistake.package / "share" / "cmake" / "torchmoe" / "torchmoeConfig.cmake"
        place = rf"CMake Error at {re.escape(str(config))}:\d+"
        caller = r"Call Stack \(most recent call first\): CMakeLists\.txt:\d+ \(find_package\)"
        told = re.fullmatch(rf"{place} \(message\): (.+?) {caller}", in_one_line(done.stderr))
        assert told is not None, done.stderr
        assert told[1] == f"torchmoe: {mistake.sentence}"
        assert done.stdout.startswith("-- before\n-- Configuring incomplete")

    def test_is_silent_where_that_is_asked(self, make: Maker, tmp_path: Path) -> None:
        done = configured(tmp_path, make(tmp_path), "QUIET")
        assert (done.returncode, done.stderr) == (0, "")
        said = done.stdout.partition("-- Configuring done")[0]
        assert said in ("-- before\n-- found <0>\n", "-- before\n-- found <FALSE>\n")


def test_a_package_that_is_not_required(tmp_path: Path) -> None:
    mistake = another_version(tmp_path)
    done = configured(tmp_path, mistake, "")
    assert done.returncode == 0
    assert in_one_line(done.stderr).endswith(f"given by package: torchmoe: {mistake.sentence}")


def test_a_path_in_the_environment(tmp_path: Path) -> None:
    done = configured(tmp_path, no_torch(tmp_path), "REQUIRED", {"CMAKE_PREFIX_PATH": "/neither"})
    assert '/nowhere" and "/neither" in the environment: add' in in_one_line(done.stderr)


def test_the_command_that_is_told_stands_on_one_line(tmp_path: Path) -> None:
    done = configured(tmp_path, no_torch(tmp_path), "REQUIRED")
    command = "python -c 'import torch; print(torch.utils.cmake_prefix_path)'"
    assert command in [line.strip() for line in done.stderr.splitlines()]


def right(folder: Path, consumer: Mistake) -> None:
    done = configured(folder, consumer, "REQUIRED")
    assert done.returncode == 0, done.stderr
    assert "-- found <1>\n" in done.stdout
    assert "torchmoe:" not in done.stderr


def test_what_fits(tmp_path: Path) -> None:
    right(tmp_path, Mistake(""))


def test_an_older_standard_of_the_project_is_raised(tmp_path: Path) -> None:
    before = "set(CMAKE_CXX_STANDARD 17)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)"
    right(tmp_path, Mistake("", before=before))


def test_a_patch_of_torch_that_tells_its_abi(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", version=f"{MINOR}.9", flags=f"-D{NEW_ABI}")
    package = installed(tmp_path / "package", TORCHMOE_CUDA="OFF")
    right(tmp_path, Mistake("", torch=other, package=package))


def test_a_library_without_cuda_needs_no_toolkit(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", libraries=CUDA_LIBRARIES)
    package = installed(tmp_path / "package", TORCHMOE_CUDA="OFF")
    right(tmp_path, Mistake("", torch=other, package=package, arguments=[NO_TOOLKIT]))


@pytest.mark.parametrize("make", [another_version, flags_of_another_abi])
def test_a_repaired_mistake_needs_no_new_build_folder(make: Maker, tmp_path: Path) -> None:
    assert configured(tmp_path, make(tmp_path), "REQUIRED").returncode == 1
    right(tmp_path, Mistake("", arguments=["-DCMAKE_CXX_FLAGS="]))


# ---- the library's own build


def own_build(
    folder: Path, torch_folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    prefix = f"-DCMAKE_PREFIX_PATH={torch_folder / 'share' / 'cmake'}"
    command = ["cmake", f"-S{ROOT}", f"-B{folder}", prefix, "-DTORCHMOE_CUDA=OFF", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_build_for_a_torch_of_another_abi(tmp_path: Path) -> None:
    other = fake_torch(tmp_path / "torch", flags=f"-D{OLD_ABI}")
    done = own_build(tmp_path / "build", other)
    assert done.returncode == 1
    sentence = of_the_flags(NEW_ABI, f"add -D{OLD_ABI} to CMAKE_CXX_FLAGS", wanted=OLD_ABI)
    assert f"torchmoe: {sentence.replace('torchmoe', 'torch')}" in in_one_line(done.stderr)

    done = own_build(tmp_path / "build", other, f"-DCMAKE_CXX_FLAGS=-D{OLD_ABI}")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "build" / "torchmoeConfig.cmake").read_text()
    assert f'set(TORCHMOE_ABI "{OLD_ABI}")\n' in written
    assert f'set(TORCHMOE_CPU "{os.uname().machine}")\n' in written
    assert "set(TORCHMOE_CUDA OFF)" in written
