"""The options: what there is, what is allowed, where a value comes from and which may change."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_lm
from lm.settings import (
    DTYPES,
    FREE_TO_CHANGE,
    MODEL_FIELDS,
    OPTIONAL,
    OPTIONS,
    Settings,
    SettingsError,
    flag,
    make_parser,
    new_run,
    read_arguments,
    read_config,
    resumed_run,
    run_from,
)
from torchmoe.nn import known_estimators
from torchmoe.nn.estimators.registry import build_estimator

OPTION_NAMES = [
    *("--data", "--layers", "--hidden-size", "--feed-forward", "--intermediate-size", "--experts"),
    *("--top-k", "--capacity-factor", "--order", "--overflow", "--balance", "--router"),
    *("--communication", "--estimator", "--normalize", "--context"),
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
    with pytest.raises(SystemExit) as exit_info:
        train_lm.main([*arguments])
    assert exit_info.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
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
    parser = make_parser("compare_lm.py", "", "", replace(Settings(), steps=12))
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
                f"--router must not look ahead in a causal .*classify.py .* got {name}, which ",
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


# ---- --config


@pytest.mark.parametrize("wrap", ["{}", '{{"settings": {}, "torch": "2", "command": []}}'])
def test_config_gives_all_values(wrap: str, tmp_path: Path) -> None:
    path = config(tmp_path, wrap.format(json.dumps(OTHERS)))
    given = read_config(path)
    assert given == OTHERS
    assert {name: type(v) for name, v in given.items()} == {n: type(v) for n, v in OTHERS.items()}


def test_config_may_say_that_there_is_no_value(tmp_path: Path) -> None:
    nothing = dict.fromkeys(OPTIONAL)
    assert read_config(config(tmp_path, json.dumps(nothing))) == nothing


def test_command_line_comes_before_config(tmp_path: Path) -> None:
    path = config(tmp_path, '{"layers": 3, "experts": 16}')
    given = {**read("--layers", "5", "--seed", "2"), "config": str(path)}
    settings, start, resumes = train_lm.choose_settings(given)
    assert settings == Settings(layers=5, experts=16, seed=2)
    assert (start, resumes) == (None, False)


def test_config_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        path = config(tmp_path, '{"out": "läufe"}'.encode(encoding))
        assert read_config(path) == {"out": "läufe"}


def test_config_may_give_a_whole_number_for_a_number(tmp_path: Path) -> None:
    value = read_config(config(tmp_path, '{"lr": 1}'))["lr"]
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", ": must be an object of names and values"),
        ("3", ": must be an object of names and values"),
        ("null", ": must be an object of names and values"),
        ('{"settings": []}', ": 'settings' is no option"),
        ('{"layer": 3}', ": 'layer' is no option; the options are .*layers"),
        ('{"hidden-size": 64}', ": 'hidden-size' is no option; the options are .*hidden_size"),
        ('{"config": "x.json"}', ": 'config' is no option"),
        ('{"resume": true}', ": 'resume' is no option"),
        ('{"layers": true}', ": layers must be a whole number from 1 to 256, got 'True'"),
        ('{"layers": "x"}', ": layers must be a whole number from 1 to 256, got \"'x'\""),
        ('{"layers": "3"}', ": layers must be a whole number from 1 to 256, got \"'3'\""),
        ('{"layers": 4.0}', ": layers must be a whole number from 1 to 256, got '4.0'"),
        ('{"layers": 0}', ": layers must be a whole number from 1 to 256, got '0'"),
        ('{"layers": null}', ": layers must be a whole number from 1 to 256, got 'None'"),
        ('{"layers": [4]}', r": layers must be a whole number from 1 to 256, got '\[4\]'"),
        ('{"lr": NaN}', ": lr must be a number from 1e-09 to 10.0, got 'nan'"),
        ('{"lr": Infinity}', ": lr must be a number from 1e-09 to 10.0, got 'inf'"),
        ('{"lr": 1e999}', ": lr must be a number from 1e-09 to 10.0, got 'inf'"),
        ('{"lr": true}', ": lr must be a number from 1e-09 to 10.0, got 'True'"),
        ('{"lr": "0.1"}', ": lr must be a number"),
        ('{"minutes": false}', ": minutes must be a number from 0.01 to 1000000, got 'False'"),
        ('{"estimator": 3}', ": estimator must be one of exact, straight_through, .*, got 3"),
        ('{"estimator": ["exact"]}', r": estimator must be one of .*, got \['exact'\]"),
        ('{"dtype": null}', ": dtype must be one of float32, float64, bfloat16, got None"),
        ('{"compile": 1}', ": compile must be true or false, got 1"),
        ('{"compile": "true"}', ": compile must be true or false, got 'true'"),
        ('{"out": 3}', ": out must be a path, got 3"),
        ('{"out": null}', ": out must be a path, got None"),
        ('{"out": ""}', ": out must be a path, got ''"),
        ('{"load": true}', ": load must be a path, got True"),
        ('{"data": "notes"}', ": data must be a list of paths, got 'notes'"),
        ('{"data": ["notes", 3]}', r": data must be a list of paths, got \['notes', 3\]"),
        ('{"data": null}', ": data must be a list of paths, got None"),
        ("", " is not JSON: "),
        ("{", " is not JSON: "),
        ("layers: 3", " is not JSON: "),
        ('{"layers": 3} {}', " is not JSON: "),
        ('{"layers": 3,}', " is not JSON: "),
        (b"\xff\xfe\xff", " is not JSON: "),
        ("[" * 100_000, " is not JSON: "),
        ('{"lr": ' + "1" * 5000 + "}", " is not JSON: |: lr must be a number"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_config_refuses(
    content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, content)
    error = refuses(capsys, "--config", str(path))
    assert re.match(f"train_lm.py: error: --config: {re.escape(str(path))}(?:{message})", error)


def test_config_refuses_values_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config(tmp_path, '{"experts": 2, "top_k": 3}'))
    assert "--top-k must be at most --experts (2), got 3" in refuses(capsys, "--config", path)
    given = {"config": path, "top_k": 2}
    assert train_lm.choose_settings(given)[0] == Settings(experts=2, top_k=2)


def test_config_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere.json"
    for path, why in ((nowhere, "No such file or directory"), (tmp_path, "Is a directory")):
        error = refuses(capsys, "--config", str(path))
        assert f"error: --config: cannot read {path}: {why} (" in error


# ---- saved settings


@given(settings())
def test_saved_settings_come_back(saved: Settings) -> None:
    back = Settings.from_dict(json.loads(json.dumps(saved.to_dict())))
    assert back == saved
    assert [type(v) for v in vars(back).values()] == [type(v) for v in vars(saved).values()]
    assert Settings.from_dict(saved.to_dict()) == saved


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_settings_refuse_a_missing_name(name: str) -> None:
    values = Settings().to_dict()
    del values[name]
    with pytest.raises(SettingsError, match=f"^there is no value for {name}$"):
        Settings.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, "'width' is no option"),
        ({3: 3}, "3 is no option"),
        ({"layers": 0}, "layers must be a whole number from 1 to 256, got '0'"),
        ({"layers": True}, "layers must be a whole number from 1 to 256, got 'True'"),
        ({"lr": "fast"}, "lr must be a number"),
        (
            {"estimator": "magic"},
            "estimator must be one of exact, straight_through, .*, got 'magic'",
        ),
        ({"top_k": 9}, r"--top-k must be at most --experts \(8\), got 9"),
        ({"steps": None}, "--steps or --minutes must say when training ends, got neither"),
    ],
)
def test_saved_settings_refuse(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        Settings.from_dict({**Settings().to_dict(), **change})


@pytest.mark.parametrize("values", [None, [], "{}", 3])
def test_saved_settings_are_an_object(values: object) -> None:
    with pytest.raises(SettingsError, match="must be an object"):
        Settings.from_dict(values)


def test_model_takes_its_settings() -> None:
    config = Settings(**OTHERS).model()
    assert vars(config) == {name: OTHERS[name] for name in MODEL_FIELDS}


def test_rows_are_whole_windows() -> None:
    assert Settings(batch_tokens=1000, context=128).rows == 7


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
