"""Every number of a run in one dataclass, and the command line made from it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn, TypeVar

from lm.model import HEAD_SIZE, ModelConfig
from torchmoe.nn import known_estimators

EXAMPLES = """\
examples:
  train_lm.py                               three domains of text that every machine has
  train_lm.py --minutes 20 --layers 6       longer and deeper; the schedule follows the clock
  train_lm.py --data ~/notes src/           your own text, one domain per path
  train_lm.py --top-k 1 --estimator straight_through --capacity-factor 1.25
  train_lm.py --load runs/lm/model.safetensors               evaluate and sample only
  train_lm.py --load runs/lm/model.safetensors --steps 500   train on
"""

Value = TypeVar("Value")


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the message names what is."""


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A parser of whole numbers (int) or numbers (float) from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}, got {text!r}")
        return value

    return parse


def option(default: Value, help_text: str, **argument: object) -> Value:
    """A field that is also a command line option; `argument` goes to argparse."""
    return field(default=default, metadata={"help": help_text, **argument})


def check_value(argument: Mapping[str, Any], text: str) -> object:
    """What argparse makes of a value, given the option's metadata."""
    try:
        value = argument.get("type", str)(text)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(str(error)) from error
    if value not in argument.get("choices", [value]):
        raise SettingsError(f"must be one of {', '.join(argument['choices'])}, got {text!r}")
    return value


@dataclass(frozen=True)
class Settings:
    """What can be set. The defaults train in about five minutes on two cores."""

    data: tuple[str, ...] = option(
        (),
        "files or folders of your own text, one domain per path; UTF-8 files are read as they are",
        nargs="+",
        metavar="PATH",
        shown="Python, English and C++ that every machine has",
    )
    steps: int | None = option(3200, "optimizer steps", type=number(int, 0, 10**9))
    minutes: float | None = option(
        None,
        "train for this time, or until --steps where that is given too",
        type=number(float, 0.01, 10**6),
        shown="no limit",
    )
    layers: int = option(4, "transformer blocks", type=number(int, 1, 256))
    hidden_size: int = option(128, f"width, a multiple of {HEAD_SIZE}", type=number(int, 1, 2**16))
    intermediate_size: int = option(256, "inner width of an expert", type=number(int, 1, 2**20))
    experts: int = option(8, "experts per layer", type=number(int, 1, 2**16))
    top_k: int = option(2, "experts that each byte visits", type=number(int, 1, 2**16))
    capacity_factor: float | None = option(
        None,
        "an expert takes at most this multiple of an even share, in training",
        type=number(float, 0.01, 10**6),
        shown="no limit",
    )
    estimator: str = option("exact", "the router's gradient", choices=known_estimators())
    lr: float = option(3e-3, "peak learning rate", type=number(float, 1e-9, 10.0))
    batch_tokens: int = option(1024, "bytes per optimizer step", type=number(int, 1, 10**9))
    context: int = option(128, "bytes the model looks back", type=number(int, 2, 2**20))
    seed: int = option(0, "same seed, same run", type=number(int, 0, 2**63 - 1))
    threads: int = option(0, "CPU threads, 0 for all cores", type=number(int, 0, 4096))
    out: str = option("runs/lm", "folder for the checkpoint", metavar="PATH")
    load: str | None = option(
        None,
        "start from this checkpoint and its settings; trains on only with --steps or --minutes",
        metavar="PATH",
        shown="a new model",
    )

    def check(self) -> None:
        """Raises SettingsError where two settings do not go together."""
        if self.hidden_size % HEAD_SIZE:
            raise SettingsError(
                f"--hidden-size must be a multiple of {HEAD_SIZE}, got {self.hidden_size}"
            )
        if self.top_k > self.experts:
            raise SettingsError(
                f"--top-k must be at most --experts ({self.experts}), got {self.top_k}"
            )
        if self.batch_tokens < self.context:
            raise SettingsError(
                f"--batch-tokens must be at least --context ({self.context}), "
                f"got {self.batch_tokens}"
            )

    def to_json(self) -> str:
        """All settings as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that to_json wrote, each value checked as one from the command line is."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != {item.name for item in fields(cls)}:
            raise SettingsError("their names are not the ones of this program")
        for item in fields(cls):
            value = values[item.name]
            if item.name == "data":
                values["data"] = tuple(str(path) for path in value)
            elif value is not None or item.name not in OPTIONAL:
                values[item.name] = check_value(item.metadata, str(value))
        settings = cls(**values)
        settings.check()
        return settings

    def model(self) -> ModelConfig:
        """The settings that shape the model."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_FIELDS})


MODEL_FIELDS = tuple(field.name for field in fields(ModelConfig))
OPTIONAL = ("steps", "minutes", "capacity_factor", "load")  # None says that there is none


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def make_parser(description: str) -> Parser:
    """One option per field of Settings; what the user leaves out stays out of the namespace."""
    parser = Parser(
        prog="train_lm.py",
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for item in fields(Settings):
        argument = dict(item.metadata)
        default = argument.pop("shown", item.default)
        argument["help"] += f" (default {default})"
        if "type" in argument:
            argument["metavar"] = "N" if isinstance(item.default, int) else "X"
        parser.add_argument(f"--{item.name.replace('_', '-')}", **argument)
    return parser


def combine(given: dict[str, Any], saved: Settings | None) -> Settings:
    """The run's settings: the defaults, or those of a checkpoint, and over them what was given."""
    given = {name: tuple(v) if name == "data" else v for name, v in given.items()}
    if saved is None:
        base = Settings()
    else:
        for name in MODEL_FIELDS:
            if given.get(name, getattr(saved, name)) != getattr(saved, name):
                raise SettingsError(
                    f"--{name.replace('_', '-')} is {getattr(saved, name)} in the checkpoint "
                    f"and cannot change, got {given[name]}"
                )
        defaults = Settings()
        base = replace(saved, steps=0, minutes=None, out=defaults.out, threads=defaults.threads)
    if "minutes" in given and "steps" not in given:
        base = replace(base, steps=None)
    settings = replace(base, **given)
    settings.check()
    return settings
