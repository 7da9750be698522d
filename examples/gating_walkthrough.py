"""The life of one gate decision, step by step and with real numbers.

A sentence of five tokens asks a layer of eight experts for help. The walkthrough pools its tokens
to one gate input, scores the experts, takes the two best, weighs them, and then follows what the
gate learns: the balancing loss, the straight-through gradient and its scaling by usage, ten tasks
in a row for one favourite, a backup that joins, a capacity, a refusal, a memory of choices. Every
number comes out of the library while this runs, next to the formula that it follows.

With --text the sentences are your own and the gates are those of a language model that
`make train` has trained. With --figure the story is one picture, too.
"""

# Read in this order:
#
#   tell()                    at the end of this file: the story, step by step
#   walkthrough/made_up.py    its words and matrices, and the layer of the library they stand in
#   walkthrough/decision.py   steps 1 to 6: one decision and its balancing loss
#   walkthrough/learning.py   steps 7 and 8: what the gate learns
#   walkthrough/ten_tasks.py  step 9: ten tasks in a row for one favourite
#   walkthrough/limits.py     steps 10 and 11: capacity and refusal
#   walkthrough/memory.py     step 12: a gate that remembers its choices
#
# Each of the last five first computes its numbers, then tells them. steps.py lists all that is
# computed. The rest can wait: printing.py has the tables, figure.py and panels.py draw --figure,
# sentences.py is --text.

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

from training import terminal
from training.arguments import Parser
from training.checkpoint import CheckpointError
from walkthrough import decision, learning, limits, memory, steps, ten_tasks
from walkthrough.made_up import SENTENCE
from walkthrough.sentences import TextError, match_sentences
from walkthrough.steps import Story

CHECKPOINT = Path("runs/lm")
FIGURE = Path("runs/gating_walkthrough.png")
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
    parser = Parser("gating_walkthrough.py", __doc__, EXAMPLES)
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
        help=f"draws the story as PATH.png, and as SVG next to it (default {FIGURE})",
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
    """Prints it from the tokens to the memory."""
    print(
        f'The life of one gate decision: "{SENTENCE}"\n\n'
        "Eight experts, two for each sentence. The matrices and the experts' names are made up,\n"
        "the matrices small enough for a pencil; the library computes everything else."
    )
    decision.tell_pooling(story.pooling)
    decision.tell_logits(story.decision)
    decision.tell_choice(story.decision)
    decision.tell_match(story.decision)
    decision.tell_fixed_case(story.fixed)
    decision.tell_balance(story.balance, story.decision)
    learning.tell_gradient(story.gradient, story.decision)
    learning.tell_scaling(story.gradient)
    ten_tasks.tell_tasks(story.row)
    limits.tell_capacity(story.room, story.row)
    limits.tell_refusal(story.room, story.refusal)
    memory.tell_memory(story.memory)


if __name__ == "__main__":
    terminal.run(main)
