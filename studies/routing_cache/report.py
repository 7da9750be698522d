"""What was found: tables, what they say, the numbers as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.common.intervals import t_interval
from studies.common.result import Result, make_table
from studies.routing_cache import figure, timing
from studies.routing_cache.queries import EXACT, QUERIES, SHARES, UNSEEN, Answer, Found
from studies.routing_cache.scale import CONFIDENCE, SIMILARITIES, USUAL, Scale
from studies.routing_cache.stream import BACK, Change, changes_of
from studies.routing_cache.text import Followed, Trained
from studies.routing_cache.timing import Case
from training.figures import Values
from training.run_folder import cores

MIB = 2**20
WIDTH = 100  # columns of what is printed
LATE = 0.1  # of the steps, at their end, over which training is averaged


@dataclass
class Everything:
    """All that was measured; one entry for each seed in each list, but for `cases`."""

    scale: Scale
    domains: list[str]
    order: list[str] = field(default_factory=list)
    """The domains as they come in the stream."""
    seconds: dict[str, float] = field(default_factory=dict)
    """That each part took."""
    queries: dict[str, list[Found]] = field(default_factory=dict)
    """By router."""
    plain: list[Trained] = field(default_factory=list)
    trained: dict[float, list[Trained]] = field(default_factory=dict)
    """By similarity."""
    text: list[dict[int, dict[float, Followed]]] = field(default_factory=list)
    """By size and similarity."""
    stream: list[dict[str, Values]] = field(default_factory=list)
    """By eviction."""
    cases: list[Case] = field(default_factory=list)


def report(folder: Path, about: str, found: Everything) -> None:
    """Prints the tables and what they say, draws the figure, writes the numbers."""
    result = Result(width=WIDTH)
    show_parts(result, found)
    show_queries(result, found)
    show_text(result, found)
    show_training(result, found)
    show_stream(result, found)
    show_time(result, found)
    content = {
        "about": " ".join(about.split()),
        "unit": "shares of 1, bits, bytes and seconds; one entry per seed in each list of them",
        "confidence": CONFIDENCE,
        "scale": asdict(found.scale),
        "domains": found.domains,
        "results": numbers(found),
    }
    result.save(figure.draw(found), content, folder, "routing_cache")


def paragraph(result: Result, text: str) -> None:
    """Prints it in lines of WIDTH; in the file it is one line, which is left to the reader."""
    print("\n" + textwrap.fill(text, WIDTH))
    result.parts.append(text)


# ---- cells


def cell(
    values: Sequence[float] | Values, digits: int = 1, factor: float = 100, sign: str = ""
) -> str:
    """The mean of the seeds and, where there are several, how far its interval reaches.

    Args:
        values: one for each seed, NaN where there was nothing to take the mean of.
        digits: behind the point.
        factor: what they are multiplied with; 100 makes a percentage.
        sign: "+" writes it for positive numbers, too.
    """
    known = factor * np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return "n/a"
    mean, _, high = t_interval(known, CONFIDENCE)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(high) else f"{text} ±{high - mean:.{digits}f}"


SIMILARITY_TITLES = tuple(f"{similarity:g}" for similarity in SIMILARITIES)


# ---- the parts


def show_parts(result: Result, found: Everything) -> None:
    """What there is, and how long it took."""
    seeds = len(found.plain)
    paragraph(
        result,
        f"The parts. {seeds} {'seeds' if seeds > 1 else 'seed'}, {found.scale.steps} optimizer "
        "steps of each model. Below, cells are means over the seeds and, after ±, how far their "
        f"{CONFIDENCE:.0%} interval (Student's), each by itself, reaches; columns are "
        "similarities, where they are numbers.",
    )
    counts = {
        "queries": sum(map(len, found.queries.values())),
        "training": seeds + sum(map(len, found.trained.values())),
        "text": seeds * len(found.scale.sizes) * len(SIMILARITIES),
        "stream": seeds * len(found.stream[0]),
        "time": len(found.cases),
    }
    table = make_table("part", "runs", "seconds")
    for part, count in counts.items():
        table.add_row(part, str(count), f"{found.seconds[part]:.0f}")
    result.show(table)


class Shown(NamedTuple):
    """What a table of texts that come again shows."""

    about: str
    pick: Callable[[Answer], float]
    digits: int = 1
    factor: float = 100
    sign: str = ""


SHOWN = (
    Shown("How many hit, %:", lambda one: mean_of(one.hit_rate)),
    Shown(
        "Agreement: how many of a hit's experts the router would have chosen itself, %:",
        lambda one: mean_of(one.agreement),
    ),
    Shown(
        "Loss with the caches less loss without, millibits per text:",
        lambda one: one.change,
        factor=1000,
        sign="+",
    ),
)


def show_queries(result: Result, found: Everything) -> None:
    """Texts that come again."""
    texts = next(iter(found.queries.values()))[0].texts
    names = {router: router.removeprefix("sequence_") for router in found.queries}
    scores = "; ".join(
        f"{names[router]} {cell([one.accuracy for one in some])} % right, "
        f"{cell([one.bits for one in some], 3, 1)} bits per text"
        for router, some in found.queries.items()
    )
    paragraph(
        result,
        f"Texts that come again. An encoder of {layers_of(found.queries)} layers, each of which "
        "routes a text as a whole by the mean of its tokens or by what a learned query attends "
        f"to. The caches remember {texts} texts, which come again exactly and with "
        "that share of their bytes drawn anew; unseen: as many others. Cells are means over the "
        f"layers. Without caches: {scores}.",
    )
    for shown in SHOWN:
        result.say("\n" + shown.about)
        table = make_table("query", *SIMILARITY_TITLES)
        for router, some in found.queries.items():
            for query in QUERIES:
                rows = {s: answers(some, s, query, shown.pick) for s in SIMILARITIES}
                table.add_row(
                    f"{names[router]}, {query}",
                    *(cell(rows[s], shown.digits, shown.factor, shown.sign) for s in SIMILARITIES),
                )
        result.show(table)
    nbytes = [size for some in found.queries.values() for size in some[0].nbytes.values()]
    least = min(
        one.answers[s][EXACT].hit_rate.min()
        for some in found.queries.values()
        for one in some
        for s in SIMILARITIES
    )
    result.say_each(
        [
            f"texts that come again exactly: at least {100 * least:.1f} % hit, whatever layer, "
            "seed and similarity",
            *(unseen_sentence(names[router], some) for router, some in found.queries.items()),
            f"the caches of all layers take {min(nbytes) / 1024:.0f} KiB at the highest "
            f"similarities to {max(nbytes) / 1024:.0f} KiB at the lowest",
        ]
    )


def unseen_sentence(name: str, some: Sequence[Found]) -> str:
    """From where on a cache finds texts of a kind rather than the text itself."""
    rates = {
        query: float(np.mean(answers(some, USUAL, query, lambda one: mean_of(one.hit_rate))))
        for query in QUERIES
    }
    unseen = rates[UNSEEN]
    start = f"{name}: at {USUAL:g} {100 * unseen:.1f} % of the unseen texts hit, "
    lost = [query for query in SHARES if rates[query] <= unseen]
    start += (
        f"no fewer than of those with {lost[0]} of their bytes new"
        if lost
        else "fewer than of the texts of every other kind"
    )
    return f"{start}; the entry of the unchanged text is found by {own_cells(some)}"


def own_cells(some: Sequence[Found]) -> str:
    """How many hits find what the unchanged text finds."""
    own = {
        query: cell(answers(some, USUAL, query, lambda one: mean_of(one.own))) for query in SHARES
    }
    return ", ".join(f"{text} % of the hits with {query}" for query, text in own.items())


def layers_of(queries: Mapping[str, Sequence[Found]]) -> int:
    """How many layers with a cache there are."""
    first = next(iter(queries.values()))[0]
    return len(first.answers[USUAL][EXACT].hit_rate)


def answers(
    some: Sequence[Found], similarity: float, query: str, pick: Callable[[Answer], float]
) -> list[float]:
    """One number of each seed."""
    return [pick(one.answers[similarity][query]) for one in some]


def mean_of(values: Values) -> float:
    """The mean of those that are numbers."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def show_text(result: Result, found: Everything) -> None:
    """The language model on held-out text."""
    scale = found.scale
    layers = len(found.text[0][scale.sizes[0]][USUAL].hit_rate)
    context = found.plain[0].model.config.context
    warm, measured = (count * scale.batch * context for count in (scale.warm, scale.measured))
    paragraph(
        result,
        f"Held-out text through the language model, every byte a gate input: {warm:,d} bytes fill "
        f"the caches, which go on changing while {measured:,d} more are measured.",
    )
    parts: tuple[tuple[str, Callable[[Followed], Values]], ...] = (
        ("How many hit, %:", lambda one: one.hit_rate),
        (
            "Agreement: how many of a hit's experts the router would have chosen itself, %:",
            lambda one: one.agreement,
        ),
    )
    for about, pick in parts:
        result.say("\n" + about)
        table = make_table("caches", *SIMILARITY_TITLES)
        for size in scale.sizes:
            for layer in range(layers):
                rows = {s: [pick(one[size][s])[layer] for one in found.text] for s in SIMILARITIES}
                table.add_row(
                    f"{size} entries, layer {layer}", *(cell(rows[s]) for s in SIMILARITIES)
                )
        result.show(table)
    result.say(
        "\nLoss with the caches less loss without, in millibits per byte; MiB of the caches of all "
        "layers;\nkeys that a lookup compares with a gate input at the end, the mean of the layers:"
    )
    table = make_table("caches", *SIMILARITY_TITLES)
    for size in scale.sizes:
        table.add_row(f"{size} entries, loss", *(change_of(found, size, s) for s in SIMILARITIES))
    for size in scale.sizes:
        nbytes = {s: found.text[0][size][s].nbytes for s in SIMILARITIES}
        table.add_row(f"{size} entries, MiB", *(f"{nbytes[s] / MIB:.1f}" for s in SIMILARITIES))
    for size in scale.sizes:
        keys = {s: [one[size][s].compared.mean() for one in found.text] for s in SIMILARITIES}
        table.add_row(f"{size} entries, keys", *(cell(keys[s], 1, 1) for s in SIMILARITIES))
    result.show(table)
    rates = {
        (size, s): float(np.mean([one[size][s].hit_rate for one in found.text]))
        for size in scale.sizes
        for s in SIMILARITIES
    }
    usual = scale.sizes[-1], USUAL
    sentences = [
        f"{what}: {100 * rates[size, s]:.1f} % hit at similarity {s:g} with {size} entries, at "
        f"{change_of(found, size, s)} millibits per byte"
        for what, (size, s) in (
            ("most hits", max(rates, key=rates.__getitem__)),
            ("as a cache is unless told otherwise", usual),
        )
    ]
    complete = sum(int(one[usual[0]][USUAL].complete.sum()) for one in found.text)
    calls = len(found.text) * layers * scale.measured
    sentences[1] += (
        f"; in {complete} of {calls} calls of a layer, of {scale.batch * context:,d} bytes each, "
        'every byte hits, so that reuse="weights" could leave the router out'
    )
    result.say_each(sentences)


def change_of(found: Everything, size: int, similarity: float) -> str:
    """The change of the held-out loss, as a cell."""
    return cell([one[size][similarity].change for one in found.text], 1, 1000, "+")


def show_training(result: Result, found: Everything) -> None:
    """The language model with caches while it trains."""
    scale = found.scale
    late = max(1, round(LATE * scale.steps))
    steps = f"{late} steps" if late > 1 else "step"
    paragraph(
        result,
        f"Caches of {scale.trained_size} entries while the model trains: how many gate inputs hit "
        f"and how many entries outlive a step, in %, in the first and in the last {steps}; loss "
        "of the training text in the last and of held-out text after the end, without caches, in "
        "bits per byte; change of the latter by the caches.",
    )
    hits, alive = ("hit, first", "last"), ("alive, first", "last")
    table = make_table("cache", *hits, *alive, "loss", "held-out", "change")
    ends: tuple[Callable[[Values], float], ...] = (
        lambda values: mean_of(values[:late]),
        lambda values: mean_of(values[-late:]),
    )
    rows = {"none": found.plain, **{f"{s:g}": some for s, some in found.trained.items()}}
    for name, some in rows.items():
        has = some is not found.plain
        table.add_row(
            name,
            *(cell([end(one.hit_rate) for one in some]) if has else "" for end in ends),
            *(cell([end(one.alive) for one in some]) if has else "" for end in ends),
            cell([ends[1](one.losses) for one in some], 3, 1),
            cell([one.held_out for one in some], 3, 1),
            cell(changes(found, some), 3, 1, "+") if has else "",
        )
    result.show(table)
    verdicts: dict[str, list[str]] = {}
    for similarity, some in found.trained.items():
        _, low, high = t_interval(np.array(changes(found, some)), CONFIDENCE)
        if math.isnan(low):
            verdict = "n/a, one seed gives no interval"
        elif low > 0:
            verdict = "the model trains worse"
        elif high < 0:
            verdict = "the model trains better"
        else:
            verdict = "no difference of the trained models that these seeds can show"
        verdicts.setdefault(verdict, []).append(f"{similarity:g}")
    result.say_each([f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items()])


def changes(found: Everything, some: Sequence[Trained]) -> list[float]:
    """Held-out loss with caches in training less that without, seed by seed."""
    return [one.held_out - plain.held_out for one, plain in zip(some, found.plain, strict=True)]


def show_stream(result: Result, found: Everything) -> None:
    """One domain after another."""
    scale = found.scale
    paragraph(
        result,
        f"One domain after another, {', '.join(found.order)}: {scale.segment} steps each, caches "
        f"of {scale.stream_size} entries, similarity {USUAL:g}, all layers. How many hit, in %, "
        "at the end of the domain before, in the first step of the new one and at its end; after "
        f"how many steps it is back at {BACK:.0%} of that.",
    )
    table = make_table("change", "before", "first", "end", "steps")
    for eviction in found.stream[0]:
        of_each = [changes_of(one[eviction], scale.segment) for one in found.stream]
        for place, name in enumerate(found.order[1:]):
            some: list[Change] = [one[place] for one in of_each]
            table.add_row(
                f"{eviction}, to {name}" + (" again" if name == found.order[0] else ""),
                cell([one.before for one in some]),
                cell([one.first for one in some]),
                cell([one.after for one in some]),
                cell([one.steps for one in some], 1, 1),
            )
    result.show(table)


# ---- time


def show_time(result: Result, found: Everything) -> None:
    """What a lookup costs and what it saves."""
    paragraph(
        result,
        f"Time on {cores()} cores in ms, the fastest of rounds in which all take turns; every "
        "lookup hits. Router: logits, selection and weights, which a hit leaves out. Without, "
        'with: the whole layer in evaluation without a cache and with one of reuse="weights". '
        "Ratio: with / without; updated: the same with an update of the cache after each call. "
        "Keys: that a lookup compares with a gate input. Work: the router's multiplications for a "
        "gate input over its lookup's.",
    )
    costs = timing.costs_of(of_group(found, timing.DEEP))
    tables: tuple[tuple[tuple[str, ...], str], ...] = (
        (
            (timing.LINEAR, timing.POOLED, timing.TEXT),
            "Linear routers: of random tokens; of whole sequences of S tokens, "
            f"{found.scale.pooled_tokens} tokens in all; of the language model, on held-out text:",
        ),
        (
            (timing.DEEP,),
            f"MLPs of two inner layers, H {timing.DEEP_HIDDEN}, E {timing.DEEP_EXPERTS}; formula: "
            "what it says of the ratio, see below:",
        ),
    )
    for groups, about in tables:
        paragraph(result, about)
        extra = ("formula",) if timing.DEEP in groups else ()
        titles = "keys", "work", "router", "lookup", "update", "without", "with", "ratio", "updated"
        table = make_table("layer", *titles, *extra)
        for case in [case for group in groups for case in of_group(found, group)]:
            times = case.router, case.lookup, case.update, case.without, case.with_cache
            table.add_row(
                case.name,
                f"{case.compared:.1f}",
                f"{case.work:.2f}",
                *(f"{1e3 * seconds:.3g}" for seconds in times),
                f"{case.ratio:.2f}",
                f"{case.updated_ratio:.2f}",
                *(f"{costs.ratio(case):.2f}" for _ in extra),
            )
        result.show(table)
    show_break_even(result, found, costs)
    result.say_each(time_verdicts(found))


def show_break_even(result: Result, found: Everything, costs: timing.Costs) -> None:
    """The formula, and what was measured."""
    paragraph(
        result,
        "Where it pays. A lookup of R gate inputs is taken to need c_l + R g + p r and a router of "
        "r multiplications for each, which has about as many parameters, c_r + R m r. Leaving "
        "the router out then pays from `r* = ((c_l - c_r) / R + g) / (m - p / R)` multiplications "
        "on, and never where m <= p / R. From the times of the MLPs and of their lookups alone: "
        f"c_l = {1e6 * costs.lookup_call:.3g} us and c_r = {1e6 * costs.call:.3g} "
        f"us for a call, g = {1e9 * costs.gate_input:.3g} ns for a gate input, m = "
        f"{1e12 * costs.multiplication:.3g} ps for a multiplication, p = "
        f"{1e12 * costs.parameter:.3g} ps for the comparison of a parameter with its copy. "
        "Measured: where the ratio of the whole layers passes 1. Right: for how many MLPs the "
        "formula says whether it pays. Over: the multiplications of a lookup, times which it is.",
    )
    deep = timing.by_gate_inputs(of_group(found, timing.DEEP))
    table = make_table("R", "formula", "over", "measured", "over", "right")
    for rows, cases in deep.items():
        lookup = cases[0].lookup_multiplications
        expected, seen = costs.break_even(rows), timing.measured_break_even(cases)
        right = sum((case.multiplications > expected) == (case.ratio < 1) for case in cases)
        table.add_row(
            f"{rows}",
            rounded(expected),
            over(expected, lookup),
            rounded(seen),
            over(seen, lookup),
            f"{right} of {len(cases)}",
        )
    result.show(table)


def rounded(value: float) -> str:
    """A count of multiplications, in three digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if math.isfinite(value) else "none"


def over(value: float, lookup: float) -> str:
    """A count over that of a lookup."""
    return "none" if not math.isfinite(value) else f"{value / lookup:.1f}"


def time_verdicts(found: Everything) -> list[str]:
    """Where it pays and where it does not."""
    sentences = []
    for group, what in (
        (timing.LINEAR, "linear routers"),
        (timing.POOLED, "pooled sequences"),
        (timing.TEXT, "linear routers on text"),
    ):
        cases = of_group(found, group)
        low, high = ends(case.lookup / case.router for case in cases)
        least, most = ends(case.ratio for case in cases)
        pays = sum(case.ratio < 1 for case in cases)
        sentences.append(
            f"{what}: the lookup takes {low:.1f} to {high:.1f} times as long as the router, the "
            f"layer with a cache {least:.2f} to {most:.2f} times as long as without; it pays in "
            f"{pays} of {len(cases)} cases"
        )
    deep = of_group(found, timing.DEEP)
    best = min(deep, key=lambda case: case.ratio)
    if best.ratio >= 1:
        return [*sentences, "no MLP is worth leaving out: with a cache every layer takes longer"]
    updated = min(deep, key=lambda case: case.updated_ratio)
    return [
        *sentences,
        f"most gained by leaving out an MLP: {best.name}, where the layer takes {best.ratio:.2f} "
        f"of its time without a cache; with updates {updated.updated_ratio:.2f} ({updated.name})",
    ]


def of_group(found: Everything, group: str) -> list[Case]:
    """The cases of one kind of router."""
    return [case for case in found.cases if case.group == group]


def ends(values: Iterable[float]) -> tuple[float, float]:
    """Least and most."""
    known = list(values)
    return min(known), max(known)


# ---- JSON


def numbers(found: Everything) -> dict[str, Any]:
    """All of it, by part."""
    costs = timing.costs_of(of_group(found, timing.DEEP))
    scale = found.scale
    parts = {
        "queries": {
            router: [asdict(one) for one in some] for router, some in found.queries.items()
        },
        "training": {
            "no cache": [of_training(one) for one in found.plain],
            **{f"{s:g}": [of_training(one) for one in some] for s, some in found.trained.items()},
        },
        "text": [
            {size: {s: asdict(one) for s, one in row.items()} for size, row in seed.items()}
            for seed in found.text
        ],
        "stream": {
            "order": found.order,
            "hit_rate": found.stream,
            "changes": [
                {
                    name: [one._asdict() for one in changes_of(rates, scale.segment)]
                    for name, rates in seed.items()
                }
                for seed in found.stream
            ],
        },
        "time": {
            "cores": cores(),
            "cases": [{**asdict(case), "ratio": case.ratio} for case in found.cases],
            "costs": costs._asdict(),
        },
    }
    return {
        part: {"seconds": found.seconds[part], "found": ready(content)}
        for part, content in parts.items()
    }


def of_training(one: Trained) -> dict[str, Any]:
    """What is left of a run without its model."""
    return {
        "losses": one.losses,
        "hit_rate": one.hit_rate,
        "alive": one.alive,
        "held_out": one.held_out,
    }


def ready(value: Any) -> Any:  # noqa: ANN401 (whatever JSON can hold)
    """The same for JSON, which has neither arrays nor NaN; six digits are enough."""
    if isinstance(value, Mapping):
        return {str(key): ready(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [ready(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
