"""Asks every law of the correct layers over many seeds, and of every mutant; resumable.

    PYTHONPATH=tests/python python -m certify.sweep correct --seeds 20
    PYTHONPATH=tests/python python -m certify.sweep mutants

Each answer is a line of build/certificates/NAME.jsonl. At the end it says what was found: false
alarms for the correct layers, what was missed for the mutants. Exit code 1 where there is any false
alarm, or less than 95 % of the mutants is caught.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from certify.layers.correct import ADAPTERS, CORRECT, Make
from certify.mutants.references import adapter_of
from certify.mutants.registry import all_mutants
from torchmoe import Adapter
from torchmoe.testing import certify, known_laws

FOLDER = Path(__file__).parents[3] / "build" / "certificates"
CAUGHT = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", choices=("correct", "mutants"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of layers")
    parser.add_argument("--without", nargs="*", default=[], help="laws that are not asked")
    options = parser.parse_args()
    path = FOLDER / f"{options.layers}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["name"], line["seed"]) for line in _lines(path)}
    laws = [
        law.name for law in known_laws() if not law.on_request and law.name not in options.without
    ]
    # The dear ones last: a mutant is left alone once it is caught.
    laws.sort(key=("gradients", "higher_orders").count)
    for name, make, adapter in _layers(options.layers):
        if options.only and name not in options.only:
            continue
        for seed in range(options.seeds):
            if (name, seed) not in done:
                line = _ask(name, make, adapter, seed, laws, options.layers == "mutants")
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name} {seed}: {line['findings'] or 'nothing'}", flush=True)
    return _verdict(options.layers, _lines(path))


def _layers(kind: str) -> Iterator[tuple[str, Make, Adapter | None]]:
    if kind == "correct":
        yield from ((name, make, ADAPTERS.get(name)) for name, make in CORRECT.items())
    else:
        for name, mutant in all_mutants().items():
            yield name, mutant.make, adapter_of(mutant)


def _ask(
    name: str, make: Make, adapter: Adapter | None, seed: int, laws: list[str], until_caught: bool
) -> dict[str, Any]:
    torch.manual_seed(seed)
    start, findings, gaps = time.perf_counter(), [], []
    for law in laws:
        certificate = certify(make(seed), adapter=adapter, laws=[law], seed=seed)
        findings += [f"{f.law}: {f.clause}, {f.where}" for f in certificate.failures]
        gaps += [f"{gap.law}: {gap.why}" for gap in certificate.not_asked if gap.could_be_asked]
        if findings and until_caught:
            break
    seconds = time.perf_counter() - start
    return {"name": name, "seed": seed, "findings": findings, "gaps": gaps, "seconds": seconds}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _verdict(kind: str, lines: list[dict[str, Any]]) -> int:
    found = [line for line in lines if line["findings"] or (kind == "correct" and line["gaps"])]
    if kind == "correct":
        print(f"{len(found)} false alarms in {len(lines)} certificates")
        return int(bool(found))
    missed = [line["name"] for line in lines if not line["findings"]]
    print(f"{len(found)} of {len(lines)} mutants caught; missed: {', '.join(missed) or 'none'}")
    return int(len(found) < CAUGHT * len(lines))


if __name__ == "__main__":
    sys.exit(main())
