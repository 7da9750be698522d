"""What several studies share: runs, intervals over seeds, figures and results."""
