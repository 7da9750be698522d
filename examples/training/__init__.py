"""What surrounds a training run, whatever the model: settings, text, display, report."""
