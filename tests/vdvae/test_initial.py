"""How parameters begin, against the rules of the two released codes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.facts import Facts
from vdvae import layers, levels, vae
from vdvae.config import ModelConfig

EFFICIENT = {
    "strides": (1, 4), "layers": (2, 3), "skips": (2, 2), "blocks": (2, 4), "widths": (8, 4), "bottlenecks": (0.5, 1.0),
    "kernels": (1, 3), "latents": (2, 3), "mixtures": 2,
}  # fmt: skip
ROOT = math.sqrt(1.0 / 5.0)  # of the 5 top-down layers


def table_of(**changes):
    return vae.make(ModelConfig(**EFFICIENT | changes), Facts((8, 8, 3), 256)).net.table


def assert_conv(table, bound, bias=0.0):
    assert (table["kernel"].bound, table["bias"].bound) == (pytest.approx(bound), pytest.approx(bias))
    assert table["kernel"].fill == table["bias"].fill == 0.0


def glorot(inputs, outputs, kernel=1):
    return math.sqrt(6.0 / ((inputs + outputs) * kernel**2))


def test_efficient_parameters_begin_as_released():
    table = table_of()
    up, down = table["bottom_up"]["level_1"], table["top_down"]["level_1"]
    layer = down["layers"]
    for cell in (up["blocks"]["cell_0"], layer["cell_0"]):
        assert_conv(cell["conv_0"], 4**-0.5, 4**-0.5)  # PyTorch's own, with a bias; the others are Glorot's
        assert_conv(cell["conv_1"], glorot(4, 4, 3))
        assert_conv(cell["conv_3"], ROOT * glorot(4, 4))
    assert_conv(layer["z_projection"], ROOT * glorot(3, 4))
    assert_conv(layer["prior"]["conv_3"], glorot(4, 8))
    assert_conv(layer["posterior"]["conv_0"], 8**-0.5, 8**-0.5)
    assert_conv(layer["posterior"]["conv_3"], glorot(4, 4))
    assert_conv(layer["prior_projection"], glorot(4, 6))
    assert_conv(up["skips"], glorot(4, 4))
    assert_conv(up["pool"], glorot(4, 8, 4))
    assert_conv(down["enter"], glorot(8, 4))
    assert (down["enter"]["bias_map"].shape, down["enter"]["bias_map"].bound) == ((8, 8, 4), 0.0)
    # Kaiming-uniform with gain 1; the fan of [1, c, h, w] is c h w.
    assert table["ends"]["start"] == ((2, 2, 8), pytest.approx(math.sqrt(3.0 / 32.0)), 0.0)


def test_each_switch_changes_what_it_says():
    layer = table_of(scale_z_projection=False)["top_down"]["level_1"]["layers"]
    assert_conv(layer["z_projection"], glorot(3, 4))
    assert_conv(layer["cell_0"]["conv_3"], ROOT * glorot(4, 4))
    layer = table_of(scale_last_convolutions=False)["top_down"]["level_1"]["layers"]
    assert_conv(layer["z_projection"], ROOT * glorot(3, 4))
    assert_conv(layer["cell_0"]["conv_3"], glorot(4, 4))
    assert_conv(table_of(zero_prior=True)["top_down"]["level_1"]["layers"]["prior"]["conv_3"], 0.0)
    assert_conv(table_of(first_convolutions="glorot")["top_down"]["level_1"]["layers"]["prior"]["conv_0"], glorot(4, 4))


def test_baseline_parameters_begin_as_released():
    found = levels.from_block_strings("1x1,4m1,4x2", "4x3,4d4,1x2", width=8, latent=2, bottleneck=0.5)
    table = vae.make(ModelConfig(**found, mixtures=2), Facts((4, 4, 3), 256)).net.table
    up, layer = table["bottom_up"]["level_1"], table["top_down"]["level_1"]["layers"]
    torch = lambda inputs, kernel=1: (inputs * kernel**2) ** -0.5
    for block in (up["blocks"]["cell_0"], up["pool"]["cell_0"]):
        assert_conv(block["conv_0"], torch(8))
        assert_conv(block["conv_1"], torch(4, 3))
        assert_conv(block["conv_3"], torch(4) * math.sqrt(1.0 / 6.0))  # of the encoder's blocks
    assert_conv(layer["cell_0"]["conv_3"], torch(4) * math.sqrt(1.0 / 4.0))  # of the decoder's
    assert_conv(layer["z_projection"], torch(2) * math.sqrt(1.0 / 4.0))
    assert_conv(layer["prior"]["conv_3"], 0.0)
    assert_conv(layer["posterior"]["conv_3"], torch(4))
    assert table["top_down"]["level_0"]["constant"] == ((1, 1, 8), 0.0, 0.0)
    assert (table["ends"]["gain"]["scale"].fill, table["ends"]["gain"]["bias"].fill) == (1.0, 0.0)


def test_parameters_are_uniform_within_their_bounds_and_independent_of_each_other():
    noisy = {"a": layers.Initial((500,), 0.5), "b": layers.Initial((500,), 0.5, 2.0)}
    table = noisy | {"c": layers.Initial((3,), fill=1.0)}
    found = jax.tree.map(np.asarray, layers.init(jax.random.key(0), table))
    for name, middle in (("a", 0.0), ("b", 2.0)):
        assert np.abs(found[name] - middle).max() <= 0.5
        assert found[name].std() == pytest.approx(0.5 / math.sqrt(3.0), rel=0.1)
    assert abs(np.corrcoef(found["a"], found["b"])[0, 1]) < 0.2
    np.testing.assert_array_equal(found["c"], jnp.ones(3))
