"""Runs the study."""

from studies.estimators.program import main
from training import terminal

terminal.run(main)
