"""Comparisons that give evidence: `python -m studies.NAME`, each with its protocol and its result.

They train the model of examples/train_lm.py, or a smaller one, with its helper package.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
