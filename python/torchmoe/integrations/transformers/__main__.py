"""`python -m torchmoe.integrations.transformers`: how each class of experts is computed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from torchmoe.integrations.transformers.catalogue import ExpertsClass, experts_classes, small
from torchmoe.integrations.transformers.experts import supported

_REFUSED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts of the answers and a table of the classes.

    Args:
        arguments: the command line's; by default those of the program.

    Returns:
        0, or 1 if a class is refused.
    """
    argparse.ArgumentParser(
        prog="python -m torchmoe.integrations.transformers",
        description="Lists how the experts of each model of the installed transformers are "
        "computed, with the settings of its default config.",
    ).parse_args(arguments)
    answers = {experts: _answer(experts) for experts in experts_classes()}
    counts = Counter(answer.partition(":")[0] for answer in answers.values())
    print(
        f"transformers {transformers.__version__}: {len(answers)} classes, "
        + ", ".join(f"{count} {answer}" for answer, count in counts.most_common())
    )
    widths = [max((len(row[column]) for row in answers), default=0) for column in (0, 2)]
    for experts, answer in answers.items():
        print(f"{experts.package:<{widths[0]}}  {experts.name:<{widths[1]}}  {answer}")
    return _REFUSED if counts["eager"] else 0


def _answer(experts: ExpertsClass) -> str:
    try:
        with torch.device("meta"):
            module = small(experts, num_experts=4, hidden_size=12, intermediate_size=10)
    except ImportError as error:
        return f"not importable: {error}"
    return supported(module)


if __name__ == "__main__":
    sys.exit(main())
