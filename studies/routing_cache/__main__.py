"""Runs the study."""

from studies.routing_cache.program import main
from training import terminal

terminal.run(main)
