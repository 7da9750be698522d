"""python -m torchmoe.testing."""

from __future__ import annotations

import json
import sys

import pytest

from torchmoe.testing.__main__ import main

LAWS = ["--laws", "router_gradient"]


def raises() -> None:
    raise KeyError("no such setting")


def leaves() -> None:
    sys.exit(0)


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("certify.layers.foreign:PlainLoop", 0),
        ("certify.mutants.routing_weights:RouterWeightsDetached", 1),
    ],
)
def test_exit_code(layer: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([layer, *LAWS]) == code
    assert layer.split(":")[1] in capsys.readouterr().out
    assert main([layer, *LAWS, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["passed"] is (code == 0)
    assert main([layer, *LAWS, "--markdown"]) == code
    assert capsys.readouterr().out.startswith("### ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:layer"], "No module named 'nowhere'"),
        (["certify.layers.foreign"], "the path must be path.to:name"),
        (["certify.layers.foreign:Nothing"], "has no attribute 'Nothing'"),
        (["torch.nn:Identity"], "hidden_size must be given"),
        (["certify.test_command_line:raises"], "KeyError: 'no such setting'"),
        (["certify.test_command_line:leaves"], "SystemExit: 0"),
        (["certify.layers.foreign:PlainLoop", "--laws", "balance, nope"], "laws must be one of"),
    ],
)
def test_what_is_no_layer(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torchmoe.testing: ")
    assert message in captured.err


def test_an_adapter_by_its_path() -> None:
    arguments = ["certify.layers.foreign:PlainLoop", "--adapter", "torchmoe:Adapter"]
    assert main([*arguments, "--laws", "reference", "--dtype", "float32"]) == 0
