"""What gating_walkthrough.py computes, draws and reads."""
