"""The parts of classify.py."""
