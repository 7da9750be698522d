"""The classifier: padding, neighbours, starts and its own attention as a router's input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from classified import SEQUENCE, lively, random_texts
from studies.classification.model import (
    HIDDEN_SIZE,
    ROUTERS,
    TOP_K,
    Classifier,
    attention_of_cls,
)
from studies.classification.texts import LONGEST, Texts
from training.settings import HEAD_SIZE


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_does_not_matter(router: str) -> None:
    model, some = lively(router), random_texts(50, 80, 65)
    missing = 1 + LONGEST - some.tokens.shape[1]
    longer = Texts(
        functional.pad(some.tokens, (0, missing), value=17),
        functional.pad(some.token_mask, (0, missing)),
        some.labels,
    )
    filled = Texts(
        some.tokens.masked_fill(~some.token_mask, ord("x")), some.token_mask, some.labels
    )
    with torch.no_grad():
        scores = model(some)
        assert scores.logits.std(dim=0).min() > 1e-2  # texts differ, and not by rounding
        for other in (longer, filled):
            again = model(other)
            torch.testing.assert_close(again.logits, scores.logits, rtol=0, atol=2e-5)
            torch.testing.assert_close(again.aux_loss, scores.aux_loss)
            for one, two in zip(again.routings, scores.routings, strict=True):
                assert torch.equal(
                    one.indices[other.token_mask.flatten()], two.indices[some.token_mask.flatten()]
                )
                assert (one.indices[~other.token_mask.flatten()] == -1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_neighbours_in_the_batch_do_not_matter(router: str) -> None:
    model, some = lively(router), random_texts(50, 80, 65)
    with torch.no_grad():
        together = model(some).logits
        alone = torch.cat([model(some.part(place, place + 1)).logits for place in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_byte_matters(router: str) -> None:
    model, some = lively(router), random_texts(60)
    changed = some.tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    with torch.no_grad():
        difference = model(Texts(changed, some.token_mask, some.labels)).logits - model(some).logits
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("router", SEQUENCE)
def test_a_sequence_has_one_choice(router: str) -> None:
    model, some = lively(router), random_texts(50, 80, 65, 70)
    with torch.no_grad():
        routings = model(some).routings
    for routing in routings:
        chosen = routing.indices.view(*some.tokens.shape, TOP_K)
        for row, mask in zip(chosen, some.token_mask, strict=True):
            assert (row[mask] == row[0]).all()
        assert routing.details["pooling_weights"].sum(dim=1).tolist() == pytest.approx([1] * 4)


def test_all_but_the_router_starts_the_same() -> None:
    models = []
    for name in ROUTERS:
        torch.manual_seed(5)
        models.append(Classifier(name, 3))
    starts = [
        {key: value for key, value in model.named_parameters() if ".router." not in key}
        for model in models
    ]
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(start[key], value) for key, value in starts[0].items())


def test_attention_of_cls_is_the_blocks_own() -> None:
    block, some = lively("sequence_given").blocks[0], random_texts(50, 80)
    x = torch.randn(2, 81, HIDDEN_SIZE)
    attention = block.attention
    found = attention_of_cls(attention, x, some.token_mask)
    # Values that hold one position each turn the attention itself into its output.
    qkv = attention.qkv(x).view(2, 81, 3, attention.heads, HEAD_SIZE).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(
        attention.rotate(qkv[0]),
        attention.rotate(qkv[1]),
        torch.eye(81).expand(2, attention.heads, 81, 81),
        attn_mask=some.token_mask[:, None, None, :],
    )[:, :, 0].mean(dim=1)
    torch.testing.assert_close(found, expected)
    assert (found[~some.token_mask] == 0).all()
    with torch.no_grad():
        routing = lively("sequence_given")(some).routings[0]
    given = routing.details["pooling_weights"]
    assert given.std() > 1e-3
    assert not torch.allclose(given, some.token_mask / some.token_mask.sum(dim=1, keepdim=True))
