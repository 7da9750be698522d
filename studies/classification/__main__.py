"""Runs the study."""

from studies.classification.program import main
from training import terminal

terminal.run(main)
