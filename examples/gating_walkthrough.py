"""The life of one gate decision, step by step and with real numbers.

A sentence of five tokens asks a layer of eight experts for help. The walkthrough pools its tokens
to one gate input, scores the experts, takes the two best, weighs them, and then follows what the
gate learns: the balancing loss, the straight-through gradient and its scaling by usage, ten tasks
in a row for one favourite, a backup that joins, a capacity, a refusal. Every number comes out of
the library while this runs; the formula that it follows stands beside it.

With --text the sentences are your own and the gates are those of a language model that
`make train` has trained. With --figure the story is one picture, too.
"""

# Read in this order: tell() below, which is the story, then walkthrough/steps.py, which computes
# its numbers. walkthrough/figure.py draws them, walkthrough/sentences.py is
# --text, walkthrough/printing.py has the tables.

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

import terminal
from lm.checkpoint import CheckpointError
from lm.settings import Parser
from walkthrough import steps
from walkthrough.printing import heading, numbers, row_of, slots_of, span, table
from walkthrough.sentences import TextError, match_sentences
from walkthrough.steps import EXPERTS, POETRY, SCIENCE, Decision, Story

CHECKPOINT = Path("runs/lm")
FIGURE = Path("runs/gating_walkthrough.png")
FEATURES = ("x1", "x2", "x3", "x4")
EXAMPLES = """\
examples:
  gating_walkthrough.py                            the story
  gating_walkthrough.py --figure                   and as one picture
  gating_walkthrough.py --text notes.txt           your sentences, the model in runs/lm
  gating_walkthrough.py --text notes.txt --checkpoint runs/longer
"""


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and tells what is asked for."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sentence may hold what no terminal can show
    parser = make_parser()
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more are slower at this size
    try:
        if given.text is not None:
            match_sentences(given.text, given.checkpoint or CHECKPOINT)
            return 0
        if given.checkpoint is not None:
            parser.error("--checkpoint: must come with --text, whose sentences the model reads")
        story = steps.compute()
        if given.figure is not None:
            draw(story, given.figure, parser)
        tell(story)
        if given.figure is not None:
            print(f"\nfigure: {given.figure}\nfigure: {given.figure.with_suffix('.svg')}")
    except (TextError, CheckpointError) as error:
        parser.error(str(error))
    return 0


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="gating_walkthrough.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8, one sentence per line: prints which expert each of them matches",
    )
    what.add_argument(
        "--figure",
        type=Path,
        nargs="?",
        const=FIGURE,
        metavar="PATH",
        help=f"draws the story, as PATH.png and beside it as SVG (default {FIGURE})",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help=f"for --text: a checkpoint of make train, or its folder (default {CHECKPOINT})",
    )
    return parser


def draw(story: Story, path: Path, parser: Parser) -> None:
    """Draws the picture; it is there before the story is told."""
    from walkthrough import figure  # matplotlib takes a second that the story does not need

    if path.suffix != ".png":
        parser.error(f"--figure: must end in .png, got {path}")
    try:
        figure.save(story, path)
    except OSError as error:
        parser.error(f"--figure: cannot write to {path}: {error.strerror}")


# ---- the story


def tell(story: Story) -> None:
    """Prints it from the tokens to the refusal."""
    print(
        f'The life of one gate decision: "{steps.SENTENCE}"\n\n'
        "Eight experts, two for each sentence. The numbers of the matrices and the experts' names\n"
        "are made up, and small enough for a pencil; all else is what the library makes of them."
    )
    tell_pooling(story)
    tell_logits(story)
    tell_choice(story)
    tell_match(story)
    tell_fixed_case(story.fixed)
    tell_balance(story)
    tell_gradient(story)
    tell_scaling(story)
    tell_tasks(story)
    tell_capacity(story)
    tell_refusal(story)


def tell_pooling(story: Story) -> None:
    """Five tokens become one gate input."""
    pooling = story.pooling
    heading(1, "Five tokens become one gate input")
    print(
        "Attention pooling: a_s = softmax over s of <query, h_s> / sqrt(4)\n"
        f"query = {row_of(pooling.query, 1)}, fixed here, learned in a model"
    )
    rows = [
        (token, *numbers(vector, 1), f"{weight:.1%}")
        for token, vector, weight in zip(
            steps.TOKENS, pooling.tokens, pooling.weights.tolist(), strict=True
        )
    ]
    table(("H", *FEATURES, "weight a_s"), rows)
    print(
        f"gate input x = sum of a_s h_s = {row_of(pooling.gate_input)}\n"
        f'"{steps.TOKENS[4]}" counts {pooling.weights[4]:.0%}, "a" {pooling.weights[1]:.0%}: '
        "what has content decides."
    )


def tell_logits(story: Story) -> None:
    """One number for each expert, then probabilities."""
    heading(2, "The gate scores the experts: z = W_g x + b_g")
    print("softmax: p_i = exp(z_i) / sum over all 8 experts of exp(z_j)")
    rows = [
        (f"{i} {name}", *numbers(weight, 1), f"{bias:.2f}", f"{z:.4f}", f"{p:.2%}")
        for i, (name, weight, bias, z, p) in enumerate(
            zip(
                EXPERTS,
                steps.vector(steps.GATE_WEIGHT),
                steps.GATE_BIAS,
                story.decision.logits.tolist(),
                story.decision.probabilities.tolist(),
                strict=True,
            )
        )
    ]
    table(("expert", *(f"W_g {n}" for n in FEATURES), "b_g", "logit z", "softmax p"), rows)


def tell_choice(story: Story) -> None:
    """The top 2 and their weights."""
    heading(3, "The two best are chosen, and weighed")
    print(choice_of(story.decision))


def choice_of(decision: Decision) -> str:
    """The choice in two lines."""
    (first, second), (one, two) = decision.chosen, decision.weights.tolist()
    p = decision.probabilities
    return (
        f"top-2 = [{first}, {second}]: {EXPERTS[first]}, then {EXPERTS[second]}\n"
        f"w_i = p_i / (p_{first} + p_{second}):   "
        f"w_{first} = {p[first]:.4f} / ({p[first]:.4f} + {p[second]:.4f}) = {one:.4f},   "
        f"w_{second} = {two:.4f}"
    )


def tell_match(story: Story) -> None:
    """How well the gate input fits each expert's row."""
    match = story.decision.match
    heading(4, "How well does each expert match?")
    print(
        "match_i = 50 (1 + cos(x, w_i)) percent, w_i the expert's row of W_g: 100 where x points\n"
        "where the row does, 50 at a right angle, 0 against it"
    )
    order = match.argsort(descending=True).tolist()
    table(
        ("expert", "match", ""),
        [
            (f"{i} {EXPERTS[i]}", f"{match[i]:.1f}%", "#" * round(match[i].item() / 2.5))
            for i in order
        ],
    )
    print(
        f"The sentence matches {EXPERTS[order[0]]} by {match[order[0]]:.0f}%. The match looks at "
        "directions only; the logit\ncounts the row's length and b_g as well, so their orders may "
        "differ below the first."
    )


def tell_fixed_case(fixed: Decision) -> None:
    """The same gate, another input."""
    heading(5, "The same gate, another text: a case to check by hand")
    print(
        f"x      = {row_of(fixed.gate_input, 1)}\n"
        f"logits = {row_of(fixed.logits, 1)}\n"
        f"p      = {row_of(fixed.probabilities)}\n"
        f"{choice_of(fixed)}\n"
        f"More physics in it, and {EXPERTS[fixed.chosen[0]]} comes first: it matches by "
        f"{fixed.match[fixed.chosen[0]]:.0f}%."
    )


def tell_balance(story: Story) -> None:
    """The loss that keeps experts in even use."""
    heading(6, "The balancing loss: N sum f P, lambda = 0.01")
    first, second = story.decision.chosen
    f, p = story.balance.fraction, story.decision.probabilities
    print(
        f"f_i = the expert's share of the slots (here one sentence's two), P_i = its mean p\n"
        f"N sum f P = 8 ({f[first]:.1f} x {p[first]:.4f} + {f[second]:.1f} x {p[second]:.4f}) "
        f"= {story.balance.loss:.4f}      1 = even, 8 = all to one expert\n"
        f"lambda N sum f P = {steps.BALANCE_WEIGHT} x {story.balance.loss:.4f} = "
        f"{story.balance.weighted:.5f}, added to the loss of the task"
    )


def tell_gradient(story: Story) -> None:
    """From the error of the output back to W_g."""
    gradient, (first, second) = story.gradient, story.decision.chosen
    g = gradient.weight_gradient
    heading(7, "What the gate learns: the straight-through gradient on W_g")
    print(
        f"The two experts, small networks with random weights, answer; y = sum of w_i E_i(x)\n"
        f"E_{first}(x) = {row_of(gradient.answers[0])}   {EXPERTS[first]}\n"
        f"E_{second}(x) = {row_of(gradient.answers[1])}   {EXPERTS[second]}\n"
        f"y      = {row_of(gradient.output)}\n"
        f"wanted = {row_of(steps.WANTED, 1)}   L = |y - wanted|^2 / 2 = {gradient.loss:.4f}\n"
        f"dL/dy  = y - wanted = {row_of(gradient.output_gradient)}\n\n"
        f"dL/dw_i = <dL/dy, E_i(x)>:   {g[0]:.4f} for {EXPERTS[first]}, {g[1]:.4f} for "
        f"{EXPERTS[second]}\n"
        "Choosing has no derivative. Straight-through treats choice and normalisation as if they\n"
        "were not there: dL/dp_i = dL/dw_i for the chosen, 0 for the others. From there on the\n"
        "chain rule is exact, with J = diag(p) - p p^T of the softmax:\n"
        "dL/dz = J^T dL/dp,   dL/dW_g = dL/dz x^T. Below 0: the step raises that logit."
    )
    table(
        ("expert", "dL/dp", "dL/dz", *(f"dL/dW_g {n}" for n in FEATURES)),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{g[story.decision.chosen.index(i)]:.4f}" if i in (first, second) else "0",
                f"{gradient.logit_gradient[i]:.4f}",
                *numbers(gradient.plain[i], 4),
            )
            for i in range(len(EXPERTS))
        ],
    )


def tell_scaling(story: Story) -> None:
    """The favourite learns to attract more slowly."""
    gradient = story.gradient
    heading(8, "Its scaling by (1 - usage)")
    print(
        f"So far the experts have had {list(steps.SLOTS_SO_FAR)} slots.\n"
        "usage_i = the share of the slots;   row i of dL/dW_g is multiplied by 1 - usage_i"
    )
    table(
        ("expert", "usage", "1 - usage", *(f"scaled {n}" for n in FEATURES)),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{usage:.2f}",
                f"{1 - usage:.2f}",
                *numbers(gradient.scaled[i], 4),
            )
            for i, usage in enumerate(gradient.usage.tolist())
        ],
    )
    usage = gradient.usage
    print(
        f"The favourite, {EXPERTS[POETRY]}, learns to attract at {1 - usage[POETRY]:.0%} of the "
        f"pace, {EXPERTS[7]}, hardly used, at {1 - usage[7]:.0%}."
    )


def tell_tasks(story: Story) -> None:
    """Ten tasks in a row for one favourite."""
    tasks = story.row.tasks
    backup = steps.BACKUP[POETRY]
    joined = next(n for n, task in enumerate(tasks, 1) if backup in task.served_by)
    heading(9, f"Ten tasks in a row for one favourite: {EXPERTS[POETRY]}")
    print(
        "The same sentence ten times. After each, usage moves a tenth of the way to that task's\n"
        "slots, and the gate takes a step (SGD, learning rate "
        f"{steps.LEARNING_RATE:g}) down lambda N sum f P, with\nf = usage. lambda is "
        f"{steps.BALANCE_WEIGHT}, but the learning rate is large and usage quick (the library's\n"
        "own remembers a hundred steps), or ten tasks would show little; and the task's own loss\n"
        "is left out, so that what moves is the balancing loss's work alone.\n"
        f"its term = 8 f_{POETRY} P_{POETRY}, the favourite's part of the sum; at work: the "
        "experts that serve it"
    )
    table(
        ("task", "usage", "N sum f P", "its term", "x lambda", "p", "w", "1 - usage", "at work"),
        [
            (
                str(n),
                f"{task.usage[POETRY]:.3f}",
                f"{task.loss:.4f}",
                f"{task.part:.4f}",
                f"{task.weighted:.5f}",
                f"{task.probabilities[POETRY]:.2%}",
                f"{task.weight:.4f}",
                f"{1 - task.usage[POETRY]:.3f}",
                " ".join(map(str, task.served_by)),
            )
            for n, task in enumerate(tasks, 1)
        ],
    )
    last = tasks[-1]
    before = tasks[joined - 2]
    print(
        f"The loss rises from {tasks[0].loss:.2f} to {last.loss:.2f}, for one expert is used again "
        "and again; at even use it\nis 1 whatever p is, so that the first step moves nothing. The "
        f"favourite's share falls: p from\n{tasks[0].probabilities[POETRY]:.1%} to "
        f"{last.probabilities[POETRY]:.1%}, and 1 - usage, the factor of its gradient, from "
        f"{1 - tasks[0].usage[POETRY]:.3f} to {1 - last.usage[POETRY]:.3f}.\n"
        f"Its usage is above {steps.THRESHOLD:g}/8 for {steps.PATIENCE} updates in a row, and from "
        f"task {joined} on its backup, {EXPERTS[backup]} ({backup}),\nis at work beside it in a "
        f"slot of its own: w falls from {before.weight:.2f} to {tasks[joined - 1].weight:.2f}. "
        f"{EXPERTS[SCIENCE].capitalize()}, the second choice,\nis used as much, but one backup "
        "joins at a time, the better choice's."
    )


def tell_capacity(story: Story) -> None:
    """How much an expert takes, and what it refuses."""
    room = story.room
    heading(10, "The capacity factor: max(1, load / mean load)")
    print(
        f"Then {steps.SENTENCES_AT_ONCE} such sentences come at once, with "
        f"{steps.TOP_K * steps.SENTENCES_AT_ONCE} slots: {room.even} for each expert if all had "
        "the same.\nfactor_i = max(1, usage_i / mean usage);   room_i = ceil(factor_i x slots / 8)"
    )
    table(
        ("expert", "usage", "factor", "room", "wanted", "kept", "refused"),
        [
            (
                f"{i} {EXPERTS[i]}",
                f"{story.row.usage[i]:.3f}",
                f"{room.factor[i]:.3f}",
                str(room.capacity[i].item()),
                str(wanted := int((room.wanted == i).sum())),
                str(kept := int((room.served == i).sum())),
                str(wanted - kept),
            )
            for i in range(len(EXPERTS))
        ],
    )


def tell_refusal(story: Story) -> None:
    """A slot that finds its expert full, and a gate that could never learn."""
    room = story.room
    heading(11, "A refusal")
    refused = [n for n, row in enumerate(room.served.tolist(), 1) if row[0] < 0]
    evenly = [n for n, row in enumerate(room.served_evenly.tolist(), 1) if row[0] < 0]
    print(
        "A full expert refuses a slot, which becomes -1. The two choices, sentence by sentence:\n"
        f"wanted                 {slots_of(room.wanted)}\n"
        f"room for {room.even} each        {slots_of(room.served_evenly)}\n"
        f"room by history        {slots_of(room.served)}\n"
        f"{EXPERTS[POETRY].capitalize()} refuses sentences {span(evenly)} with even room, "
        f"{span(refused)} with room by history."
    )
    print(
        "\nThe library refuses, too: a gate with one expert per token, whose weight w = p / p = 1\n"
        "is constant, asked for the exact gradient, which is 0 whatever happens. It says\n"
    )
    print(textwrap.indent(textwrap.fill(f"ValueError: {story.refusal}", 90), "  "))


if __name__ == "__main__":
    terminal.run(main)
