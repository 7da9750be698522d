"""Runs the study."""

from studies.dense.program import main
from training import terminal

terminal.run(main)
