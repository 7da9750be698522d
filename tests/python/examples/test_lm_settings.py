"""The options: what there is, what is allowed, where a value comes from and which may change."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given

import train_lm
from lm_command_line import OPTION_NAMES, OTHERS, read, refuses, settings
from training.settings import (
    FREE_TO_CHANGE,
    MODEL_FIELDS,
    OPTIONS,
    Settings,
    SettingsError,
    flag,
    make_parser,
    new_run,
    resumed_run,
    run_from,
)

# ---- the command line


def test_has_every_option() -> None:
    parser = make_parser("train_lm.py", "", "", Settings())
    flags = {name for action in parser._actions for name in action.option_strings}
    assert flags == {"-h", "--help", "--no-compile", "--no-communication", *OPTION_NAMES}
    assert {flag(item.name) for item in fields(Settings)} == {*OPTION_NAMES} - {
        "--config",
        "--resume",
    }


def test_help_tells_each_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_lm.main(["--help"])
    assert exit_info.value.code == 0
    paragraphs = re.split(r"\n(?=  -)", capsys.readouterr().out)
    texts = {text.split()[0].rstrip(","): " ".join(text.split()) for text in paragraphs}
    assert texts.keys() >= {*OPTION_NAMES}
    for item in fields(Settings):
        default = item.metadata.get("shown", item.default)
        assert default not in (None, ())
        assert texts[flag(item.name)].count(f"(default {default})") == 1
        assert item.metadata["help"] in texts[flag(item.name)]


def test_help_tells_the_defaults_of_another_program() -> None:
    parser = make_parser("study.py", "", "", replace(Settings(), steps=12))
    assert "optimizer steps (default 12)" in parser.format_help()


def test_examples_of_the_help_are_in_order() -> None:
    commands = re.findall(r"train_lm\.py((?: \S+)*)", train_lm.EXAMPLES)
    assert len(commands) >= 8
    for command in commands:
        read(*command.split())


def test_each_option_sets_its_value() -> None:
    assert OTHERS.keys() == OPTIONS.keys()
    for name, value in OTHERS.items():
        words = [str(word) for word in (value if isinstance(value, tuple) else [value])]
        given = read(flag(name), *([] if value is True else words))
        assert given == {name: value}
        assert type(given[name]) is type(value)
        assert getattr(Settings(), name) != value
    assert read("--config", "x.json", "--resume") == {"config": "x.json", "resume": True}
    assert read("--no-compile") == {"compile": False}
    assert read() == {}


NOT_WITH = "does not go with the other settings: the layer's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "argument --layers: must be a whole number from 1 to 256, got '0'"),
        ("--layers 257", "argument --layers: must be a whole number from 1 to 256, got '257'"),
        ("--layers two", "argument --layers: must be a whole number from 1 to 256, got 'two'"),
        ("--layers 4.0", "argument --layers: must be a whole number from 1 to 256, got '4.0'"),
        ("--lr nan", "argument --lr: must be a number from 1e-09 to 10.0, got 'nan'"),
        ("--lr inf", "argument --lr: must be a number from 1e-09 to 10.0, got 'inf'"),
        ("--minutes 0", "argument --minutes: must be a number from 0.01 to 1000000, got '0'"),
        ("--capacity-factor -1", "argument --capacity-factor: must be a number from 0.01"),
        ("--steps -1", "argument --steps: must be a whole number from 0 to 99999999, got '-1'"),
        ("--seed 9223372036854775808", "argument --seed: must be a whole number from 0 to 922337"),
        ("--estimator magic", "argument --estimator: .*'magic'.*exact.*straight_through"),
        ("--order last", "argument --order: .*'last'.*choice.*token"),
        ("--dtype float16", "argument --dtype: .*'float16'.*float32.*float64.*bfloat16"),
        ("--device tpu", "argument --device: .*'tpu'.*cpu.*cuda"),
        ("--feed-forward sparse", "argument --feed-forward: .*'sparse'.*moe.*dense"),
        ("--compile yes", "unrecognized arguments: yes"),
        ("--data", "argument --data: expected at least one argument"),
        ("--step 5", "unrecognized arguments: --step 5"),  # no abbreviations
        ("notes", "unrecognized arguments: notes"),
        ("--hidden-size 100", "--hidden-size must be a multiple of 32, got 100"),
        ("--experts 2 --top-k 3", r"--top-k must be at most --experts \(2\), got 3"),
        (
            "--estimator sparsemixer --normalize topk",
            f'--normalize topk {NOT_WITH} gate.normalize must be "none" '
            "for the estimator SparseMixer",
        ),
        ("--normalize uniform", "--normalize must not make .* --estimator exact, .* got uniform"),
        ("--normalize topk --top-k 1", "--normalize must not make the weights .* got topk"),
        (
            "--overflow next_best",
            "--overflow must be drop without --capacity-factor, got next_best",
        ),
        ("--overflow backup", "argument --overflow: .*'backup'.*drop.*next_best"),
        (
            "--balance bias --estimator sparsemixer",
            f"--balance bias {NOT_WITH} balance.selection_bias_rate must be "
            "0 for the estimator SparseMixer",
        ),
        *(
            (
                f"--router {name}",
                "--router must not look ahead in a causal .*studies/classification "
                f".* got {name}, which ",
            )
            for name in ("sequence_mean", "sequence_attention", "expert_choice")
        ),
        (
            "--router sequence_first --estimator gumbel_straight_through",
            f"--estimator gumbel_straight_through {NOT_WITH} gate.estimator "
            "must not draw each token's experts with SequenceRouter",
        ),
        (
            "--communication --estimator default_vector",
            f"--estimator default_vector {NOT_WITH} gate.estimator must not "
            "need the output of each expert alone",
        ),
        ("--communication --top-k 1", "--top-k must be at least 2 with --communication, got 1"),
        (
            "--router hash --estimator sparsemixer",
            f"--estimator sparsemixer {NOT_WITH} gate.estimator must not "
            "draw each token's experts with HashRouter",
        ),
        (
            "--router hash --capacity-factor 1 --overflow next_best",
            f"--overflow next_best {NOT_WITH} capacity.overflow must not "
            "lead tokens to experts that HashRouter gives no score",
        ),
        (
            "--router hash --balance bias",
            f"--balance bias {NOT_WITH} balance.selection_bias_rate must be 0 with HashRouter",
        ),
        ("--balance both", "argument --balance: .*'both'.*loss.*bias.*none"),
        ("--batch-tokens 64", r"--batch-tokens must be at least --context \(128\), got 64"),
    ],
)
def test_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.match(f"train_lm.py: error: {message}", refuses(capsys, *arguments.split()))


@pytest.mark.parametrize("name", ["out", "load", "data"])
def test_refuses_an_empty_path(name: str) -> None:
    # As of a variable of the shell that is not set; the current folder is meant only as a dot.
    with pytest.raises(SettingsError, match=f"^{name} must be a"):
        new_run(Settings(), read(flag(name), ""))


# ---- which values a run gets


def test_new_run_is_the_defaults_and_what_was_given() -> None:
    assert new_run(Settings(), {}) == Settings()
    assert new_run(Settings(), {"lr": 0.1}) == Settings(lr=0.1)
    assert new_run(Settings(layers=2), {"lr": 0.1}) == Settings(layers=2, lr=0.1)
    assert new_run(Settings(), OTHERS) == Settings(**OTHERS)
    assert new_run(Settings(), {"data": ["a"]}).data == ("a",)


@pytest.mark.parametrize(
    ("given", "steps", "minutes"),
    [
        ({"minutes": 3.0}, None, 3.0),
        ({"minutes": 3.0, "steps": 5}, 5, 3.0),
        ({"minutes": 3.0, "steps": None}, None, 3.0),
        ({"minutes": None}, 3200, None),
        ({"steps": 5}, 5, None),
        ({"steps": 0}, 0, None),
    ],
)
def test_minutes_alone_take_the_limit_of_steps_away(
    given: dict[str, Any], steps: int | None, minutes: float | None
) -> None:
    settings = new_run(Settings(), given)
    assert (settings.steps, settings.minutes) == (steps, minutes)


@pytest.mark.parametrize("given", [{"steps": None}, {"steps": None, "minutes": None}])
def test_a_run_has_an_end(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="--steps or --minutes must say when training ends"):
        new_run(Settings(), given)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_run_from_weights_may_change(name: str) -> None:
    # One that changes everything that can be changed without another model.
    saved = Settings(**{**OTHERS, "batch_tokens": 4096, "load": None})
    value = getattr(Settings(), name)
    if value is None:
        value = "topk" if name == "normalize" else 3
    given = {"load": "runs/lm", name: value}
    if name == "load":
        given["load"] = "runs/lm"
    if name in MODEL_FIELDS:
        before = getattr(saved, name)
        message = f"^{flag(name)} is {before} in the checkpoint and cannot change, got "
        with pytest.raises(SettingsError, match=message):
            run_from(saved, given)
        assert getattr(run_from(saved, {name: before}), name) == before
    else:
        assert getattr(run_from(saved, given), name) == given[name]


def test_a_run_from_weights_keeps_settings_but_those_of_the_machine() -> None:
    saved = Settings(**{**OTHERS, "load": None})
    settings = run_from(saved, {"load": "runs/lm"})
    machine = {name: getattr(Settings(), name) for name in FREE_TO_CHANGE}
    assert settings == replace(saved, load="runs/lm", steps=0, minutes=None, **machine)
    assert run_from(saved, {"steps": 9}).steps == 9
    timed = run_from(saved, {"minutes": 2.0})
    assert (timed.steps, timed.minutes) == (None, 2.0)


def test_what_no_number_of_a_run_depends_on() -> None:
    assert {*FREE_TO_CHANGE} == {"threads", "device", "checkpoint_every", "out"}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_resumed_run_may_change(name: str) -> None:
    before, after = getattr(Settings(), name), OTHERS[name]
    assert resumed_run(Settings(), {name: before}) == Settings()
    if name in FREE_TO_CHANGE:
        assert resumed_run(Settings(), {name: after}) == replace(Settings(), **{name: after})
    else:
        message = f"{flag(name)} is {before} in the run to resume and cannot change, got {after}"
        with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
            resumed_run(Settings(), {name: after})


def test_a_resumed_run_may_name_its_data_again() -> None:
    saved = Settings(data=("notes", "src"))
    assert resumed_run(saved, read("--data", "notes", "src")) == saved
    with pytest.raises(SettingsError, match=r"--data is .* in the run to resume"):
        resumed_run(saved, read("--data", "src", "notes"))


@given(settings())
def test_a_resumed_run_takes_its_own_settings(saved: Settings) -> None:
    assert resumed_run(saved, json.loads(json.dumps(saved.to_dict()))) == saved
