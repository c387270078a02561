"""The two stacks against golden vectors of a gated PixelCNN built from them."""

import flax.linen as nn
import numpy as np
import pytest

from bitsperdim.causal import shift_right
from bitsperdim.convolution import Conv
from vqvae2.two_stack import Streams, TwoStackConv


class GatedPixelCNN(nn.Module):
    """van den Oord et al. 2016, figure 2: three layers of 6 channels, the first blind to its own cell."""

    @nn.compact
    def __call__(self, x):
        gate = lambda y: np.tanh(y[..., :6]) * nn.sigmoid(y[..., 6:])
        streams, found = Streams(x, shift_right(x)), {}
        for i in range(3):
            before = streams.horizontal
            streams = Streams(*map(gate, TwoStackConv(12, 5, columns=3 if i else 2, name=f"layer_{i}")(streams)))
            horizontal = Conv(6, (1, 1), name=f"out_{i}")(streams.horizontal)
            streams = streams._replace(horizontal=horizontal + before if i else horizontal)
            found |= {f"act/v{i}": streams.vertical, f"act/h{i}": streams.horizontal}
        return found | {"logits": Conv(12, (1, 1), name="head")(nn.relu(streams.horizontal))}


@pytest.fixture
def data(golden):
    return golden("vqvae2/gated_pixelcnn_two_stack")


def test_every_golden_activation(data):
    conv = lambda name: {
        "kernel": data[f"param/{name}/w"].transpose(2, 3, 1, 0),
        "bias": data[f"param/{name}/b"],
    }
    params = {"head": conv("head")}
    for i in range(3):
        layer = {"vertical": conv(f"v{i}"), "horizontal": conv(f"h{i}"), "link": conv(f"v2h{i}")}
        params |= {f"layer_{i}": layer, f"out_{i}": conv(f"hr{i}")}
    found = GatedPixelCNN().apply({"params": params}, np.eye(12, dtype=np.float32)[data["codes"]])
    assert len(found) == 7
    for name, value in found.items():
        np.testing.assert_allclose(value, data[name].transpose(0, 2, 3, 1), atol=1e-5, err_msg=name)
