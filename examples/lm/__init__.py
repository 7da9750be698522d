"""What examples/train_lm.py is made of: settings, corpus, model, checkpoint."""
