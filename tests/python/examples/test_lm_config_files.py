"""Settings in files: --config, and those that a run saves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from lm_command_line import OTHERS, config, read, refuses, settings
from training import program
from training.settings import (
    MODEL_FIELDS,
    OPTIONAL,
    OPTIONS,
    Settings,
    SettingsError,
    read_config,
)

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
    settings, start, resumes = program.choose_settings(given)
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
    assert program.choose_settings(given)[0] == Settings(experts=2, top_k=2)


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
