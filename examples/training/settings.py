"""Every number of a run in one dataclass, and the command line made from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from torchmoe.nn import known_estimators
from torchmoe.nn.estimators.registry import build_estimator
from torchmoe.ops import NORMALIZES, ORDERS
from training.arguments import Parser, number
from training.routers import ROUTERS, looks_ahead

HEAD_SIZE = 32  # of the attention, in every model
FEED_FORWARDS = ("moe", "dense")
OVERFLOWS = ("drop", "next_best")
BALANCES = ("loss", "bias", "none")
# What weights are held in.
TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
DTYPES = tuple(TORCH_DTYPES)
# A run that is resumed may change these: no number of the run depends on them, but for the rounding
# of torch's own matrix products, which follows the number of threads and the device.
FREE_TO_CHANGE = ("threads", "device", "checkpoint_every", "out")
# None says that there is none.
OPTIONAL = ("normalize", "steps", "minutes", "capacity_factor", "load")
# What the layer calls a setting that it may refuse together with others.
REFUSED_BY_LAYER = {
    "gate.estimator": "estimator",
    "gate.normalize": "normalize",
    "balance.selection_bias_rate": "balance",
    "capacity.overflow": "overflow",
}

Value = TypeVar("Value")


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the message names what is."""


def option(group: str, default: Value, help_text: str, **argument: object) -> Value:
    """A field that is also a command line option; `argument` goes to argparse."""
    return field(default=default, metadata={"group": group, "help": help_text, **argument})


@dataclass(frozen=True)
class ModelConfig:
    """What the model's parameters and computation depend on."""

    layers: int
    hidden_size: int
    feed_forward: str
    intermediate_size: int
    experts: int
    top_k: int
    shared_experts: int
    capacity_factor: float | None
    order: str
    overflow: str
    balance: str
    router: str
    communication: bool
    estimator: str
    normalize: str | None
    context: int


@dataclass(frozen=True)
class Settings:
    """What can be set. The defaults train in about five minutes on two cores."""

    data: tuple[str, ...] = option(
        "text",
        (),
        "files or folders of your own text, one domain per path; UTF-8 files are read as they are",
        nargs="+",
        metavar="PATH",
        shown="Python, English and C++ that every machine has",
    )
    layers: int = option("model", 4, "transformer blocks", type=number(int, 1, 256))
    hidden_size: int = option(
        "model", 128, f"width, a multiple of {HEAD_SIZE}", type=number(int, 1, 2**16)
    )
    feed_forward: str = option(
        "model",
        "moe",
        "moe, or dense: one network that has as many parameters as the experts that a byte visits",
        choices=FEED_FORWARDS,
    )
    intermediate_size: int = option(
        "model", 256, "inner width of an expert", type=number(int, 1, 2**20)
    )
    experts: int = option("model", 8, "experts per layer", type=number(int, 1, 2**16))
    top_k: int = option("model", 2, "experts that each byte visits", type=number(int, 1, 2**16))
    shared_experts: int = option(
        "model", 0, "further experts, which every byte visits", type=number(int, 0, 2**16)
    )
    capacity_factor: float | None = option(
        "model",
        None,
        "an expert takes at most this multiple of an even share, in training",
        type=number(float, 0.01, 10**6),
        shown="no limit",
    )
    order: str = option(
        "model",
        "choice",
        "who is served first where --capacity-factor is given: all first choices, or earlier bytes",
        choices=ORDERS,
    )
    overflow: str = option(
        "model",
        "drop",
        "what becomes of a byte whose expert is full: the expert's part is dropped, or the byte's "
        "next best expert with room takes it",
        choices=OVERFLOWS,
    )
    balance: str = option(
        "model",
        "loss",
        "what keeps the experts' loads even: an auxiliary loss; a bias on who is chosen, moved "
        "against the load after each step (DeepSeek-V3); or nothing",
        choices=BALANCES,
    )
    router: str = option(
        "model",
        "linear",
        "how bytes are scored: by a linear map; by direction, learned (X-MoE); by a fixed hash of "
        "the byte; or one decision for the sequence by its first byte. The others look ahead, "
        "which a language model must not: studies/classification has them",
        choices=tuple(ROUTERS),
    )
    communication: bool = option(
        "model",
        False,
        "lets the experts of a byte exchange information before their outputs are added up",
        action=argparse.BooleanOptionalAction,
    )
    estimator: str = option("model", "exact", "the router's gradient", choices=known_estimators())
    normalize: str | None = option(
        "model",
        None,
        "the weights of a byte's experts: topk makes them add up to 1, uniform makes them equal, "
        "none leaves their scores",
        choices=NORMALIZES,
        shown="what the estimator is made for",
    )
    context: int = option("model", 128, "bytes the model looks back", type=number(int, 2, 2**20))
    steps: int | None = option("training", 3200, "optimizer steps", type=number(int, 0, 99_999_999))
    minutes: float | None = option(
        "training",
        None,
        "train for this time, or until --steps where that is given too",
        type=number(float, 0.01, 10**6),
        shown="no limit",
    )
    batch_tokens: int = option(
        "training",
        1024,
        "bytes per optimizer step, of all processes; as many windows of --context as fit",
        type=number(int, 1, 10**9),
    )
    lr: float = option("training", 3e-3, "peak learning rate", type=number(float, 1e-9, 10.0))
    seed: int = option("training", 0, "same seed, same run", type=number(int, 0, 2**63 - 1))
    dtype: str = option(
        "machine",
        "float32",
        "float32 and float64 hold everything in that type; bfloat16 is autocast over float32 "
        "weights, slow on a CPU without instructions for it",
        choices=DTYPES,
    )
    compile: bool = option(
        "machine",
        False,
        "torch.compile the model: a minute or more at the start, faster steps",
        action=argparse.BooleanOptionalAction,
    )
    threads: int = option("machine", 0, "CPU threads, 0 for all cores", type=number(int, 0, 4096))
    device: str = option("machine", "cpu", "where the model computes", choices=("cpu", "cuda"))
    out: str = option(
        "files", "runs/lm", "folder for checkpoints, metrics and figures", metavar="FOLDER"
    )
    checkpoint_every: int = option(
        "files",
        400,
        "steps from one checkpoint to the next, each with a short held-out test",
        type=number(int, 1, 99_999_999),
    )
    load: str | None = option(
        "files",
        None,
        "start from these weights and settings, a checkpoint or the folder of a run; trains on "
        "only with --steps or --minutes",
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
        if (reason := looks_ahead(self.router)) is not None:
            raise SettingsError(
                "--router must not look ahead in a causal language model (studies/classification "
                f"has those that do), got {self.router}, which {reason}"
            )
        if self.communication and self.top_k == 1:
            raise SettingsError(
                "--top-k must be at least 2 with --communication, got 1: nobody to talk to"
            )
        constant = self.normalize == "uniform" or (self.normalize == "topk" and self.top_k == 1)
        if constant and build_estimator(self.estimator).gate_estimator == "exact":
            raise SettingsError(
                f"--normalize must not make the weights constant with --estimator {self.estimator},"
                f" whose router would learn nothing, got {self.normalize}"
            )
        if self.overflow != "drop" and self.capacity_factor is None:
            raise SettingsError(
                f"--overflow must be drop without --capacity-factor, got {self.overflow}"
            )
        if self.steps is None and self.minutes is None:
            raise SettingsError("--steps or --minutes must say when training ends, got neither")
        if self.batch_tokens < self.context:
            raise SettingsError(
                f"--batch-tokens must be at least --context ({self.context}), "
                f"got {self.batch_tokens}"
            )

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Turns what a layer refuses into the error of the option that asked for it."""
        try:
            yield
        except ValueError as error:
            message = str(error).removeprefix("MoE: ")
            argument = message.partition(" must ")[0]
            name = REFUSED_BY_LAYER[argument]
            raise SettingsError(
                f"{flag(name)} {getattr(self, name)} does not go with the other settings: the "
                f"layer's {message}"
            ) from error

    @property
    def rows(self) -> int:
        """Windows per optimizer step."""
        return self.batch_tokens // self.context

    def model(self) -> ModelConfig:
        """The settings that shape the model."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Settings:
        """The settings that to_dict gave, each checked as one from the command line is."""
        checked = check_values(values)
        if missing := [name for name in OPTIONS if name not in checked]:
            raise SettingsError(f"there is no value for {', '.join(missing)}")
        settings = cls(**checked)
        settings.check()
        return settings


OPTIONS = {item.name: item for item in fields(Settings)}
MODEL_FIELDS = tuple(item.name for item in fields(ModelConfig))


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def check_values(values: object) -> dict[str, Any]:
    """Values by name, from JSON or the command line, turned into those that Settings hold."""
    if not isinstance(values, dict):
        raise SettingsError("must be an object of names and values")
    for name in values:
        if name not in OPTIONS:
            raise SettingsError(f"{name!r} is no option; the options are {', '.join(OPTIONS)}")
    return {name: check_value(name, value) for name, value in values.items()}


def check_value(name: str, value: object) -> object:
    """One value, turned into the one that Settings hold; types are not bent to fit."""
    argument: Mapping[str, Any] = OPTIONS[name].metadata
    if value is None and name in OPTIONAL:
        return None
    if name == "data":
        if not isinstance(value, list | tuple) or not all(map(is_text, value)):
            raise SettingsError(f"{name} must be a list of paths, got {value!r}")
        return tuple(value)
    if "type" in argument:
        try:
            # repr writes a number as the command line would, and nothing else as a number.
            return cast(object, argument["type"](repr(value)))
        except argparse.ArgumentTypeError as error:
            raise SettingsError(f"{name} {error}") from error
    if "choices" in argument:
        if value not in argument["choices"]:
            allowed = ", ".join(argument["choices"])
            raise SettingsError(f"{name} must be one of {allowed}, got {value!r}")
    elif "action" in argument:
        if not isinstance(value, bool):
            raise SettingsError(f"{name} must be true or false, got {value!r}")
    elif not is_text(value):
        raise SettingsError(f"{name} must be a path, got {value!r}")
    return value


def is_text(value: object) -> bool:
    """Whether this is a text with something in it."""
    return isinstance(value, str) and value != ""


def make_parser(prog: str, description: str, examples: str, defaults: Settings) -> Parser:
    """One option per field of Settings; what the user leaves out stays out of the namespace."""
    parser = Parser(prog, description, examples, argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for item in OPTIONS.values():
        argument = dict(item.metadata)
        title = argument.pop("group")
        default = argument.pop("shown", getattr(defaults, item.name))
        argument["help"] += f" (default {default})"
        if "type" in argument:
            argument["metavar"] = "N" if isinstance(item.default, int) else "X"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(item.name), **argument)
    groups["files"].add_argument(
        "--config",
        metavar="FILE",
        help="JSON with any of these options by name, such as the run.json of a run; the command "
        "line comes before it",
    )
    groups["files"].add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint under --out, to the bit as if never stopped",
    )
    return parser


def read_arguments(parser: Parser, arguments: list[str] | None) -> dict[str, Any]:
    """What was given on the command line, by name."""
    given = vars(parser.parse_args(arguments))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a JSON file: an object of options, or one with that object as "settings"."""
    try:
        content = json.loads(path.read_bytes())  # UTF-8, whatever the locale
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            content = content["settings"]
        return check_values(content)
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from error
    except SettingsError as error:
        raise SettingsError(f"--config: {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--config: {path} is not JSON: {error}") from error


def with_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, over what is in the file that --config names, where it names one."""
    given = dict(given)
    if "config" not in given:
        return given
    return {**read_config(Path(given.pop("config"))), **given}


def new_run(defaults: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings of a run from scratch: the defaults, and over them what was given."""
    return _over(defaults, check_values(given))


def run_from(saved: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings of a run that starts from trained weights: the model's are settled."""
    given = check_values(given)
    _refuse_changes(saved, given, MODEL_FIELDS, "in the checkpoint")
    defaults = {name: getattr(Settings(), name) for name in FREE_TO_CHANGE}
    return _over(replace(saved, steps=0, minutes=None, **defaults), given)


def resumed_run(saved: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings of a run that goes on: all but a few are settled."""
    given = check_values(given)
    settled = [name for name in OPTIONS if name not in FREE_TO_CHANGE]
    _refuse_changes(saved, given, settled, "in the run to resume")
    return replace(saved, **given)


def _over(base: Settings, given: dict[str, Any]) -> Settings:
    if given.get("minutes") is not None and "steps" not in given:
        base = replace(base, steps=None)
    settings = replace(base, **given)
    settings.check()
    return settings


def _refuse_changes(
    saved: Settings, given: dict[str, Any], settled: Iterable[str], where: str
) -> None:
    for name in settled:
        before = getattr(saved, name)
        if given.get(name, before) != before:
            raise SettingsError(
                f"{flag(name)} is {before} {where} and cannot change, got {given[name]}"
            )
