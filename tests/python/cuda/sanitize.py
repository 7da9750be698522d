"""Every op forward and backward, and the layer, once on small shapes: for compute-sanitizer.

PYTHONPATH=python:tests/python compute-sanitizer python tests/python/cuda/sanitize.py
"""

from __future__ import annotations

import argparse

import torch

import on_device
from on_device import LAYERS, LayerStep, forward_backward, moved, op_tests, prepared
from situations import SITUATIONS

# Sizes of no block and no vector, slots that go nowhere, and nothing at all.
SITUATION_NAMES = ("dropped", "large", "no_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every op once.")
    parser.add_argument("--device", default="cuda:0", help="default cuda:0")
    on_device.DEVICE = parser.parse_args().device
    torch.manual_seed(0)
    runs = 0
    for tests in op_tests():
        case = tests.case
        for variant in case.variants:
            for dtype in case.dtypes:
                for name in SITUATION_NAMES:
                    if name in case.situations:
                        inputs = moved(case.make(SITUATIONS[name], dtype, **variant))
                        function, names, given = prepared(case, inputs)
                        forward_backward(function, inputs, names, given)
                        runs += 1
    for name in LAYERS:
        LayerStep(name, torch.bfloat16)()
        runs += 1
    if on_device.DEVICE != "cpu":
        torch.cuda.synchronize()
    print(f"{runs} runs")


if __name__ == "__main__":
    main()
