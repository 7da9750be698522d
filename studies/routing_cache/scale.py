"""How much of everything there is, in the study and in its small form."""

from __future__ import annotations

from dataclasses import dataclass

SIMILARITIES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
CONFIDENCE = 0.95  # of each interval
USUAL = 0.98  # what a cache has unless it is told otherwise


@dataclass(frozen=True)
class Scale:
    """What the parts of the study have in common, and what each has of its own."""

    steps: int
    """Optimizer steps of every model."""
    batch: int
    """Windows that the language model reads at once where it does not train."""
    windows: int
    """Of each domain, on which the trained models are tested."""
    # ---- repeated and paraphrased texts
    texts: int
    """That are remembered, at most; as many are unseen."""
    # ---- the text of `make train`
    sizes: tuple[int, ...]
    """Most entries of a cache."""
    warm: int
    """Batches that fill the caches."""
    measured: int
    """Batches after those."""
    trained_size: int
    """Most entries of a cache while the model trains."""
    trained_similarities: tuple[float, ...]
    # ---- one domain after another
    stream_size: int
    """Most entries of a cache."""
    segment: int
    """Steps of the stream in one domain, each of a quarter of a batch."""
    # ---- time
    rounds: int
    """In which the contenders take turns, at least."""
    tokens: tuple[int, ...]
    """Of a layer with a linear router."""
    hidden: tuple[int, ...]
    experts: tuple[int, ...]
    deep_tokens: tuple[int, ...]
    """Of a layer whose router is an MLP."""
    widths: tuple[int, ...]
    """Of its two inner layers."""
    lengths: tuple[int, ...]
    """Of sequences that are pooled."""
    pooled_tokens: int
    """Of those sequences together."""


FULL = Scale(
    steps=300,
    batch=32,
    windows=256,
    texts=512,
    sizes=(512, 4096, 32768),
    warm=8,
    measured=3,
    trained_size=4096,
    trained_similarities=(0.9, 0.98, 0.999),
    stream_size=512,
    segment=16,
    rounds=12,
    tokens=(512, 4096),
    hidden=(256, 1024),
    experts=(8, 64),
    deep_tokens=(64, 512, 4096),
    widths=(64, 128, 256, 1024),
    lengths=(512, 2048),
    pooled_tokens=4096,
)
SMALL = Scale(
    steps=8,
    batch=4,
    windows=16,
    texts=32,
    sizes=(64, 512),
    warm=2,
    measured=1,
    trained_size=512,
    trained_similarities=(0.9, 0.98),
    stream_size=64,
    segment=4,
    rounds=2,
    tokens=(64,),
    hidden=(64, 128),
    experts=(8,),
    deep_tokens=(16, 128),
    widths=(32, 256),
    lengths=(32, 64),
    pooled_tokens=128,
)
