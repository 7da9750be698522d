"""Runs the study."""

from studies.balance.program import main
from training import terminal

terminal.run(main)
