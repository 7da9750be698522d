"""The n-gram yardstick: every number against a dictionary written straight from the formula."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training import ngrams

# Few letters, so that contexts repeat; 0 and 255 among them, as they are the ends of the keys.
ALPHABETS = (bytes([0, 255]), b"ab\xff", bytes(range(256)))
TEXTS = st.sampled_from(ALPHABETS).flatmap(
    lambda alphabet: st.lists(
        st.lists(st.sampled_from(alphabet), max_size=40).map(bytes), max_size=4
    )
)


def as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def fit(texts: list[bytes], order: int) -> ngrams.NGrams:
    return ngrams.fit([as_tensor(text) for text in texts], order)


def bits(model: ngrams.NGrams, window: bytes, order: int) -> list[float]:
    return model.bits(as_tensor(window)[None], order)[0].tolist()


class Reference:
    """The definition: a dictionary from each context to how often each byte followed it."""

    def __init__(self, texts: list[bytes], order: int) -> None:
        self.followers: dict[bytes, Counter[int]] = {}
        for text in texts:
            for place, byte in enumerate(text):
                for length in range(min(order - 1, place) + 1):
                    context = text[place - length : place]
                    self.followers.setdefault(context, Counter())[byte] += 1

    def probability(self, byte: int, context: bytes) -> float:
        lower = self.probability(byte, context[1:]) if context else 1 / 256
        if context not in self.followers:
            return lower
        seen = self.followers[context]
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    def bits(self, window: bytes, order: int) -> list[float]:
        return [
            -math.log2(self.probability(window[j], window[max(0, j - order + 1) : j]))
            for j in range(1, len(window))
        ]


@given(texts=TEXTS, window=TEXTS, order=st.integers(1, ngrams.HIGHEST_ORDER))
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(texts: list[bytes], window: list[bytes], order: int) -> None:
    # The window starts with text that was seen and goes on with text that may not be.
    text = b"".join([*texts[:1], *window])
    model, reference = fit(texts, order), Reference(texts, order)
    for lower in range(1, order + 1):
        assert bits(model, text, lower) == pytest.approx(reference.bits(text, lower), rel=1e-12)


def test_by_hand() -> None:
    # "aab" has a twice, b once, and after a: a once, b once.
    model = fit([b"aab"], 2)
    a = (2 + 2 / 256) / (3 + 2)
    b = (1 + 2 / 256) / (3 + 2)
    z = (0 + 2 / 256) / (3 + 2)
    assert bits(model, b"aabz", 1) == pytest.approx([-math.log2(p) for p in (a, b, z)])
    after_a = [(1 + 2 * a) / 4, (1 + 2 * b) / 4]
    # Nothing follows b, so z after it has the odds of order 1.
    assert bits(model, b"aabz", 2) == pytest.approx([-math.log2(p) for p in (*after_a, z)])


@pytest.mark.parametrize("context", [b"the q", b"he qu", b"\xff\xffqu", b"zzzz", b"\0"])
def test_probabilities_sum_to_one(context: bytes) -> None:
    model = fit([b"the queen and the quick quilt", b"\0\xff\0\xff\xff"], 5)
    windows = torch.stack([as_tensor(context + bytes([byte])) for byte in range(256)])
    for order in range(1, 6):
        p = torch.exp2(-model.bits(windows, order)[:, -1])
        assert p.min() > 0
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)


def test_no_ngram_spans_two_texts() -> None:
    apart, joined = fit([b"abc", b"xyz"], 3), fit([b"abcxyz"], 3)
    window = b"bcx"
    assert bits(apart, window, 3)[1] == pytest.approx(
        Reference([b"abc", b"xyz"], 3).bits(window, 3)[1]
    )
    assert bits(apart, window, 3)[1] > bits(joined, window, 3)[1] + 1


def test_a_window_knows_nothing_before_its_start() -> None:
    text = b"to be or not to be, that is the question"
    model = fit([text], 5)
    windows = as_tensor(text).unfold(0, 9, 1)  # [W, 9]
    every = model.bits(windows, 5)
    assert every.shape == (len(text) - 8, 8)
    assert every.dtype == torch.float64
    for row, window in enumerate(windows):
        assert torch.equal(every[row], model.bits(window[None], 5)[0])
        for order in range(1, 5):  # byte `order` - 1 has `order` - 1 bytes before it
            assert torch.equal(
                every[row, : order - 1], model.bits(window[None], order)[0, : order - 1]
            )


def test_serves_lower_orders_as_if_fitted_to_them() -> None:
    texts = [b"mississippi", b"mississauga", b""]
    five = fit(texts, 5)
    for order in range(1, 6):
        assert bits(five, b"miss missi", order) == bits(fit(texts, order), b"miss missi", order)


@pytest.mark.parametrize("texts", [[], [b""], [b"a"], [b"ab", b"", b"c"]])
def test_texts_shorter_than_the_order(texts: list[bytes]) -> None:
    model, reference = fit(texts, 5), Reference(texts, 5)
    for window in (b"", b"a", b"ab", b"abcabc"):
        assert bits(model, window, 5) == pytest.approx(reference.bits(window, 5), rel=1e-12)
    if not any(texts):
        assert bits(model, b"abc", 5) == [8, 8]


def test_any_integer_type_and_layout() -> None:
    model = fit([bytes(range(256)) * 2, b"\xff" * 9], 4)
    windows = torch.tensor([[254, 255, 0, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    expected = model.bits(windows, 4)
    assert torch.equal(model.bits(windows.long(), 4), expected)
    assert torch.equal(model.bits(windows.t().contiguous().t(), 4), expected)
    assert model.bits(windows[:0], 4).shape == (0, 3)


@pytest.mark.parametrize("order", [-1, 0, 8])
def test_refuses_an_order_that_cannot_be_fitted(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be from 1 to 7, got {order}"):
        fit([b"abc"], order)


@pytest.mark.parametrize("order", [0, 3])
def test_refuses_an_order_that_was_not_fitted(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be from 1 to 2, got {order}"):
        bits(fit([b"abc"], 2), b"abc", order)
