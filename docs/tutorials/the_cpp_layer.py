"""
The layer from C++
==================

The layer, its ops and the checks of gradients are a C++ library that needs LibTorch and no Python.
This tutorial compiles three small programs: one trains a layer, one exchanges a layer's state with
Python, and one tests the gradient of an autograd function of its own. The guide :doc:`/cpp` says
what else there is, and what only Python has.

The sources lie in the folder ``the_cpp_layer`` next to this script:
:download:`CMakeLists.txt </tutorials/the_cpp_layer/CMakeLists.txt>`,
:download:`first.cpp </tutorials/the_cpp_layer/first.cpp>`,
:download:`exchange.cpp </tutorials/the_cpp_layer/exchange.cpp>` and
:download:`gradients.cpp </tutorials/the_cpp_layer/gradients.cpp>`.
"""

# %%
# What does a program look like?
# ------------------------------
#
# Like the Python one. Options have the same names, defaults and checks as the arguments in Python;
# a record such as ``Capacity`` is built by calls. A forward pass returns the output, the balancing
# loss and the routing, and ``update`` is called once per optimizer step.
#
# .. literalinclude:: /tutorials/the_cpp_layer/first.cpp
#    :language: cpp
#
# How is it built?
# ----------------
#
# With CMake. One target brings the headers, both libraries and the language standard, C++20.
#
# .. literalinclude:: /tutorials/the_cpp_layer/CMakeLists.txt
#    :language: cmake
#
# CMake must be told of two folders, that of torch and that of torchmoe. Each package knows its own;
# it is the same for an installed wheel and for a checkout.

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch

import torchmoe

prefix_path = f"{torch.utils.cmake_prefix_path};{torchmoe.cmake_prefix_path}"
sources = Path(sys.argv[0]).resolve().parent / "the_cpp_layer"  # next to this script
folder = Path(tempfile.mkdtemp())
tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
cmake = shutil.which("cmake", path=tools)
compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
can_build = cmake and any(map(shutil.which, compilers))

# %%
# A helper runs a program and returns what it prints.


def run(*command):
    environment = dict(os.environ, OMP_NUM_THREADS="1")  # layers this small need no more
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout)
    return done.stdout


# %%
# Most of the time goes into torch's headers. Without a compiler the page has the programs and not
# what they print.

if can_build:
    run(cmake, "-S", sources, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix_path}")
    run(cmake, "--build", folder / "build", "--parallel", "2")
    print("built:", *sorted(path.stem for path in sources.glob("*.cpp")))
else:
    print("No CMake or no C++ compiler was found here: the programs are shown and not run.")

# %%
# And it trains:

if can_build:
    printed = run(folder / "build" / "first")
    print(printed, end="")
    # sphinx_gallery_start_ignore
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert float(rows[-1][1]) < 0.5 * float(rows[0][1])
    assert int(rows[-1][2]) < int(rows[0][2])
    assert int(rows[-1][3]) > int(rows[0][3])
    # sphinx_gallery_end_ignore

# %%
# The loss falls, and the busiest and the idlest expert come closer to the even share of 64 slots.
# That is what the selection bias is for, which ``update`` moves.
#
# Is it the same layer?
# ---------------------
#
# The second program reads the state dict of a Python layer, as ``torch.save`` wrote it, makes one
# step of training, and writes its outputs and its state for Python. (A name that ends in
# ``.safetensors`` gives that format.)
#
# .. literalinclude:: /tutorials/the_cpp_layer/exchange.cpp
#    :language: cpp
#    :start-at: int main
#
# Python makes the layer and the tokens, and keeps what it expects.

from torchmoe.nn import MoE

torch.set_num_threads(1)
torch.manual_seed(0)
layer = MoE(16, 32, num_experts=8, top_k=2)
x = torch.randn(64, 16)
torch.save(layer.state_dict(), folder / "python.pt")
torch.save({"x": x}, folder / "tokens.pt")

optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
output = layer(x)
(output.hidden_states.square().mean() + output.aux_loss).backward()
optimizer.step()

# %%
# "The same" can be asked of every bit:

if can_build:
    print(run(folder / "build" / "exchange", folder))
    results = torch.load(folder / "results.pt")
    returned = MoE(16, 32, num_experts=8, top_k=2)
    returned.load_state_dict(torch.load(folder / "cpp.pt"))
    pairs = {
        "y before the step": (output.hidden_states, results["y"]),
        "y after the step": (layer(x).hidden_states, results["y after the step"]),
        "y of the state that came back": (layer(x).hidden_states, returned(x).hidden_states),
    }
    for name, parameter in layer.named_parameters():
        pairs[name] = (parameter, returned.get_parameter(name))
    print("Python and C++                        equal")
    for name, (python, cpp) in pairs.items():
        print(f"{name:<36}  {torch.equal(python, cpp)}")
        # sphinx_gallery_start_ignore
        assert torch.equal(python, cpp), name
    assert not torch.equal(results["y"], results["y after the step"])
    # sphinx_gallery_end_ignore

# %%
# The outputs are equal bit for bit, and so are the parameters after a step, which means that the
# gradients were: both languages call the same kernels in the same order.
#
# Is my own gradient right?
# -------------------------
#
# ``torchmoe/testing.h`` compares the gradient of any function with finite differences. Here is one
# for a router: a soft cap, which keeps logits within ±cap. The derivative of cap · tanh(x / cap) is
# 1 - tanh²(x / cap), and ``backward`` below is written from memory.
#
# .. literalinclude:: /tutorials/the_cpp_layer/gradients.cpp
#    :language: cpp
#    :start-after: // [soft cap]
#    :end-before: // [/soft cap]
#
# The check takes the function as a type, the tensors first, then what is not differentiated:
#
# .. literalinclude:: /tutorials/the_cpp_layer/gradients.cpp
#    :language: cpp
#    :start-after: // [check]
#    :end-before: // [/check]

if can_build:
    checks = run(folder / "build" / "gradients").splitlines()
    print(textwrap.fill(checks[0], 80, subsequent_indent="    "))
    # sphinx_gallery_start_ignore
    assert checks[0].startswith("SoftCap: gradcheck: the derivative of output 0 at [0, 0]")
    assert "8 of 64 entries differ" in checks[0]
    # sphinx_gallery_end_ignore

# %%
# The message names an entry and both values. ``8 of 64 entries`` is a hint as well: the Jacobian of
# a function that works on each of 8 elements by itself has 8 entries that are not zero, and all of
# them are wrong. The saved y is cap · tanh, and the formula needs tanh. A second class has the
# mended ``backward``:
#
# .. literalinclude:: /tutorials/the_cpp_layer/gradients.cpp
#    :language: cpp
#    :start-after: // [mended]
#    :end-before: // [/mended]

if can_build:
    print(checks[1])
    # sphinx_gallery_start_ignore
    assert checks[1] == "MendedSoftCap: right"
    # sphinx_gallery_end_ignore

# %%
# Does the layer with it keep the laws?
# -------------------------------------
#
# A right function can still stand in a wrong layer. ``certify`` takes a layer as functions, here
# one with the soft cap in its router, and asks about more: masked tokens, micro-batches, a token
# alone, second derivatives.
#
# .. literalinclude:: /tutorials/the_cpp_layer/gradients.cpp
#    :language: cpp
#    :start-after: // [layer]
#    :end-before: // [/layer]

if can_build:
    print("\n".join(checks[2:]))
    # sphinx_gallery_start_ignore
    assert sum(line.startswith("holds") for line in checks) == 6
    assert not any(line.startswith("FAILS") for line in checks)
    # sphinx_gallery_end_ignore
shutil.rmtree(folder)

# %%
# Every law that was asked holds. The last line says what was not asked and why: with
# ``.by_expert``, the names of the parameters that have a row for each expert, ``certify`` also
# exchanges experts. The same is there in Python, with more laws; see :doc:`/certificates` and
# :doc:`/testing_gradients`. A whole program, a language model that trains without Python, is
# ``examples/cpp``.
