"""A process that was forked from one which has used threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, warnings
import torch
from torchmoe.nn import Balance, Gate, MoE

torch.set_num_threads(2)
estimator = sys.argv[1]
losses = [("importance_loss", 0.1), ("load_loss", 0.1), ("mutual_information_loss", 0.1)]
balance = Balance(losses=losses, z_loss_weight=0.1)
moe = MoE(16, 8, 4, 2, gate=Gate(estimator=estimator), balance=balance)


def step(tokens):
    x = torch.randn(tokens, 16, requires_grad=True)
    output = moe(x)
    (output.hidden_states.sum() + output.aux_loss).backward()
    moe.update(output.routing)


step(20_000)  # on both threads
warnings.simplefilter("ignore")  # Python's own, about forking with threads
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends a child that waits for threads which it has not
    for tokens in (0, 1, 20):
        step(tokens)
    os._exit(0)
status = os.waitpid(child, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status) and f"the child ended with status {status}")
"""


@pytest.mark.parametrize("estimator", ["exact", "straight_through_dense", "default_vector"])
def test_small_work_survives(estimator: str) -> None:
    command = [sys.executable, "-c", SCRIPT, estimator]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
