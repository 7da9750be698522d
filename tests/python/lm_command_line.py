"""The command line of the training program, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import train_lm
from refused import refused
from torchmoe.nn import known_estimators
from torchmoe.nn.estimators.registry import build_estimator
from training.settings import (
    DTYPES,
    Settings,
    make_parser,
    read_arguments,
)

OPTION_NAMES = [
    *("--data", "--layers", "--hidden-size", "--feed-forward", "--intermediate-size", "--experts"),
    *("--top-k", "--shared-experts", "--capacity-factor", "--order", "--overflow", "--balance"),
    *("--router", "--communication", "--estimator", "--normalize", "--context"),
    *("--steps", "--minutes", "--batch-tokens", "--lr", "--seed"),
    *("--dtype", "--compile", "--threads", "--device"),
    *("--out", "--checkpoint-every", "--load", "--config", "--resume"),
]
# Another allowed value of each setting than its default.
OTHERS: dict[str, Any] = {
    "data": ("notes", "src"),
    "layers": 3,
    "hidden_size": 64,
    "feed_forward": "dense",
    "intermediate_size": 100,
    "experts": 16,
    "top_k": 3,
    "shared_experts": 1,
    "capacity_factor": 1.25,
    "order": "token",
    "overflow": "next_best",
    "balance": "bias",
    "router": "cosine",
    "communication": True,
    "estimator": "straight_through",
    "normalize": "none",
    "context": 64,
    "steps": 7,
    "minutes": 0.5,
    "batch_tokens": 2048,
    "lr": 0.01,
    "seed": 5,
    "dtype": "float64",
    "compile": True,
    "threads": 2,
    "device": "cuda",
    "out": "runs/other",
    "checkpoint_every": 10,
    "load": "runs/lm",
}


def read(*arguments: str) -> dict[str, Any]:
    """What the command line gives."""
    return read_arguments(make_parser("train_lm.py", "It trains.", "", Settings()), [*arguments])


def refuses(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the whole program refuses."""
    output, error = refused(capsys, train_lm.main, *arguments)
    assert output == ""
    assert error.startswith("train_lm.py: error: ")
    assert error.endswith(" (--help lists the options)\n")
    return error


def config(tmp_path: Path, content: str | bytes) -> Path:
    """A file for --config."""
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def settings() -> st.SearchStrategy[Settings]:
    """Settings with all values drawn, and none that do not go together."""
    return st.builds(
        lambda top_k, more, context, windows, hidden, full, bias, router, talks, **rest: Settings(
            experts=top_k + more,
            top_k=top_k,
            context=context,
            batch_tokens=context * windows,
            hidden_size=32 * hidden,
            overflow="drop" if rest["capacity_factor"] is None or router == "hash" else full,
            balance="none" if rest["estimator"] == "sparsemixer" or router == "hash" else bias,
            router="cosine" if build_estimator(rest["estimator"]).draws else router,
            communication=talks
            and top_k > 1
            and not build_estimator(rest["estimator"]).takes_experts_alone,
            **rest,
        ),
        top_k=st.integers(1, 100),
        more=st.integers(0, 100),
        context=st.integers(2, 2**20),
        windows=st.integers(1, 100),
        hidden=st.integers(1, 2**11),
        data=st.lists(st.text(min_size=1)).map(tuple),
        layers=st.integers(1, 256),
        shared_experts=st.integers(0, 100),
        feed_forward=st.sampled_from(("moe", "dense")),
        intermediate_size=st.integers(1, 2**20),
        capacity_factor=st.none() | st.floats(0.01, 10**6),
        order=st.sampled_from(("choice", "token")),
        full=st.sampled_from(("drop", "next_best")),
        bias=st.sampled_from(("loss", "bias", "none")),
        router=st.sampled_from(("linear", "cosine", "hash", "sequence_first")),
        talks=st.booleans(),
        estimator=st.sampled_from(known_estimators()),
        normalize=st.sampled_from((None, "none")),
        steps=st.integers(0, 99_999_999),
        minutes=st.none() | st.floats(0.01, 10**6),
        lr=st.floats(1e-9, 10),
        seed=st.integers(0, 2**63 - 1),
        dtype=st.sampled_from(DTYPES),
        compile=st.booleans(),
        threads=st.integers(0, 4096),
        device=st.sampled_from(("cpu", "cuda")),
        out=st.text(min_size=1),
        checkpoint_every=st.integers(1, 99_999_999),
        load=st.none() | st.text(min_size=1),
    )
