"""What surrounds a training run: settings, text, checkpoints, display, report. No model is here."""
