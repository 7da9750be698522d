"""Runs the study."""

from studies.routers.program import main
from training import terminal

terminal.run(main)
