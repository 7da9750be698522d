"""The float types that every op and layer takes: the tests' one list of them."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Those in which nothing is added up.
NARROW = tuple(dtype for dtype in FLOATS if dtype.itemsize < torch.float32.itemsize)
#: Those that torch's autocast casts to.
AUTOCAST = (torch.bfloat16, torch.float16)
