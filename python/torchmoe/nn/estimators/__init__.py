"""Gradient estimators: what the router learns from, one file each, and their names."""
