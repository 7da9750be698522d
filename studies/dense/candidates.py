"""What is compared: the mixtures and the dense models that are tried, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studies.common.outcome import checked
from training.settings import Settings, SettingsError

MORE_EXPERTS = (1, 2, 4)  # times as many as --experts
TOP_K = (1, 2)
WIDTHS = (1, 2, 4, 8)  # of dense models, times that of an expert


@dataclass(frozen=True)
class Side:
    """The candidates of one side of the comparison."""

    first: dict[str, Settings]
    """Tried at first."""
    around: dict[str, dict[str, Settings]]
    """Tried next, by the name of the best of the first."""

    @property
    def all(self) -> dict[str, Settings]:
        """Each that may be tried."""
        return self.first | {
            name: some for nearby in self.around.values() for name, some in nearby.items()
        }

    def only(self, names: Collection[str]) -> Side:
        """Those with one of these names."""

        def named(some: Mapping[str, Settings]) -> dict[str, Settings]:
            return {name: one for name, one in some.items() if name in names}

        return Side(named(self.first), {name: named(some) for name, some in self.around.items()})


def selected(sides: Mapping[str, Side], names: Collection[str]) -> dict[str, Side]:
    """What is tried of each side, all where nothing is named.

    Raises:
        SettingsError: there is no such candidate, or none of a side to begin with.
    """
    known = [name for side in sides.values() for name in side.all]
    for name in names:
        if name not in known:
            raise SettingsError(f"--candidates must name some of {', '.join(known)}, got {name}")
    found = {name: side.only(names or known) for name, side in sides.items()}
    for name, side in found.items():
        if not side.first:
            first = ", ".join(sides[name].first)
            raise SettingsError(f"--candidates must name at least one of {first}, got none")
    return found


def plain(common: Settings) -> str:
    """The mixture that the training program trains, by which the time is set."""
    return mixture_name(common.experts, max(TOP_K))


def mixtures(common: Settings) -> Side:
    """Mixtures with more experts and fewer for each byte, and variants of the best of them.

    Raises:
        SettingsError: there is no such mixture.
    """
    if common.intermediate_size % 2:
        raise SettingsError(
            "--intermediate-size must be even, since fine-grained experts are half as wide, "
            f"got {common.intermediate_size}"
        )
    first, around = {}, {}
    for times in MORE_EXPERTS:
        for top_k in TOP_K:
            experts = times * common.experts
            name = mixture_name(experts, top_k)
            some = replace(common, feed_forward="moe", experts=experts, top_k=top_k)
            first[name] = named(name, some)
            around[name] = {other: named(other, one) for other, one in variants(name, some).items()}
    return Side(first, around)


def named(name: str, some: Settings) -> Settings:
    """The settings of a model, whose folder has its name.

    Raises:
        SettingsError: there is no such model.
    """
    return checked(replace(some, out=str(Path(some.out) / name)))


def mixture_name(experts: int, top_k: int) -> str:
    """What a mixture is called."""
    return f"E{experts}-K{top_k}"


def variants(name: str, some: Settings) -> dict[str, Settings]:
    """A mixture changed in one way each."""
    found = {
        f"{name}-fine": replace(
            some,
            experts=2 * some.experts,
            top_k=2 * some.top_k,
            intermediate_size=some.intermediate_size // 2,
        ),
        f"{name}-shared": replace(some, shared_experts=1),
    }
    if some.top_k > 1:  # one expert's weight is not normalised anyway, since it would be 1
        found[f"{name}-none"] = replace(some, normalize="none")
    return found


def dense_models(common: Settings) -> Side:
    """Dense models of several widths, and of the widths between the best of them and its next."""

    def model(width: int) -> tuple[str, Settings]:
        name = f"W{width}"
        some = replace(common, feed_forward="dense", top_k=1, intermediate_size=width)
        return name, named(name, some)

    widths = [common.intermediate_size * times for times in WIDTHS]
    return Side(
        dict(model(width) for width in widths),
        {f"W{width}": dict(model(width * part // 4) for part in (3, 6)) for width in widths},
    )
