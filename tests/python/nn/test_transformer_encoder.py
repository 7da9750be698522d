"""`WithAttachedLoss` in the place of `linear1` of torch's encoder.

nn.TransformerEncoderLayer and nn.TransformerEncoder have fused ways for evaluation, which read the
weights of `linear1` and `linear2` and never call them. The outputs are compared with the formula,
composed here.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torchmoe.nn import MoE, WithAttachedLoss

H, HEADS, E, K = 8, 2, 4, 2
B, S = 3, 5


def encoder_layer(*, norm_first: bool = False, activation: str = "identity") -> nn.Module:
    """A layer as users write it: made by torch, then its feed-forward part replaced."""
    layer = nn.TransformerEncoderLayer(
        H, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    layer.linear1 = WithAttachedLoss(MoE(H, 16, E, K))
    layer.linear2 = nn.Identity()
    if activation == "identity":
        layer.activation = nn.Identity()
    return layer


def composed(layer: nn.Module, x: Tensor, padding: Tensor | None = None) -> Tensor:
    """The formula of torch's documentation."""

    def attention(x: Tensor) -> Tensor:
        return layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    def feed_forward(x: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1.moe(x).hidden_states))

    if layer.norm_first:
        x = x + attention(layer.norm1(x))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attention(x))
    return layer.norm2(x + feed_forward(x))


def modes() -> list[pytest.param]:
    return [
        pytest.param(torch.enable_grad, id="grad"),
        pytest.param(torch.no_grad, id="no_grad"),
        pytest.param(torch.inference_mode, id="inference_mode"),
    ]


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("linear2", ["identity", "linear"])
def test_a_layer_in_evaluation(mode, norm_first, activation, linear2) -> None:
    layer = encoder_layer(norm_first=norm_first, activation=activation).eval()
    if linear2 == "linear":
        layer.linear2 = nn.Linear(H, H)
    x = torch.randn(B, S, H)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])
    with mode():
        assert_close(layer(x), composed(layer, x))
        assert_close(
            layer(x, src_key_padding_mask=padding)[~padding],
            composed(layer, x, padding)[~padding],
        )


def test_one_part_of_a_sequence_as_linear1() -> None:
    layer = encoder_layer().eval()
    attached = layer.linear1
    layer.linear1 = nn.Sequential(nn.Linear(H, H), attached)
    x = torch.randn(B, S, H)
    with torch.no_grad():
        inner = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        expected = layer.norm2(inner + attached.moe(layer.linear1[0](inner)).hidden_states)
        assert_close(layer(x), expected)


@pytest.mark.parametrize("mode", modes())
def test_an_encoder_in_evaluation(mode) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x = torch.randn(B, S, H)
    with mode():
        expected = composed(encoder.layers[1], composed(encoder.layers[0], x))
        assert_close(encoder(x), expected)


@pytest.mark.parametrize("mode", modes())
def test_an_encoder_with_padding(mode) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    x = torch.randn(B, S, H)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])
    with mode():
        expected = composed(encoder.layers[1], composed(encoder.layers[0], x, padding), padding)
        got = encoder(x, src_key_padding_mask=padding)
    assert_close(got[~padding], expected[~padding])


def test_an_encoder_with_nested_tensors_names_the_way_out() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])
    with (
        torch.no_grad(),
        pytest.raises(AttributeError, match=r"^WithAttachedLoss: .*enable_nested_tensor=False"),
    ):
        encoder(torch.randn(B, S, H), src_key_padding_mask=padding)


def test_training_and_evaluation_agree_and_training_trains() -> None:
    layer = encoder_layer()
    x = torch.randn(B, S, H)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.linear1.parameters())
    trained = layer(x)
    with torch.no_grad():
        assert_close(layer.eval()(x), trained)


def test_state_parameters_and_copies_are_those_of_the_layer() -> None:
    attached = WithAttachedLoss(MoE(H, 16, E, K))
    assert list(attached.state_dict()) == ["moe." + name for name in attached.moe.state_dict()]
    assert [name for name, _ in attached.named_parameters()] == [
        "moe." + name for name, _ in attached.moe.named_parameters()
    ]
    assert not list(attached.buffers(recurse=False))
    # Code that initialises whatever has a weight passes it over.
    assert not hasattr(attached, "weight")
    assert getattr(attached, "bias", None) is None
    with pytest.raises(AttributeError, match="no attribute 'wight'"):
        _ = attached.wight

    x = torch.randn(B, S, H)
    layer = encoder_layer().eval()
    with torch.no_grad():
        assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
def test_compiles(training: bool) -> None:
    layer = encoder_layer().train(training)
    x = torch.randn(B, S, H)
    with torch.set_grad_enabled(training):
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
