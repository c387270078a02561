"""A very deep VAE of images: the network between padded inputs and the likelihood of the unpadded image.

`infer` sees an image, `generate` none; both take where each layer's latents come from (`network.Source`).
Not here: the objective (`model_stage.py`), and what is done with a trained run (`sampling.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from vdvae import layers, levels, network, outputs
from vdvae.config import ModelConfig
from vdvae.layers import Params
from vdvae.network import Draw, Keep, Network, Source
from vdvae.outputs import Output


class Vae(NamedTuple):
    """A model of images of one shape and number of levels."""

    config: ModelConfig
    facts: Facts
    net: Network
    output: Output

    @property
    def num_layers(self) -> int:
        return levels.num_layers(self.net.levels)

    @property
    def num_dims(self) -> int:
        """D, height x width x channels of the unpadded image."""
        height, width, channels = self.facts.shape
        return height * width * channels


def make(config: ModelConfig, facts: Facts) -> Vae:
    """Raises InputError where output or whitening do not fit the images."""
    output = outputs.make(config, facts.shape[-1], facts.levels)
    if config.whiten and facts.levels != 256:
        raise InputError(f"model.whiten is for images of 256 levels, not {facts.levels}; set it to ()")
    return Vae(config, facts, network.make(config, facts.shape, output.numbers), output)


def init(vae: Vae, key: Key[Array, ""]) -> Params:
    return layers.init(key, vae.net.table)


def inputs(vae: Vae, image: UInt8[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """What the network sees: whitened, or the values of the levels, with zeros around them."""
    if vae.config.whiten:
        mean, deviation = vae.config.whiten
        x = (image.astype(jnp.float32) - mean) / deviation
    elif vae.config.target_bits < 8:
        x = image.astype(jnp.float32) / 127.5 - 1.0
    else:
        x = vae.output.values(image)
    top, left = levels.margins(vae.config, vae.facts.shape)
    height, columns = levels.padded(vae.config, vae.facts.shape)
    rest = (height - image.shape[1] - top, columns - image.shape[2] - left)
    return jnp.pad(x, ((0, 0), (top, rest[0]), (left, rest[1]), (0, 0)))


def target(vae: Vae, image: UInt8[Array, "b h w c"]) -> Int[Array, "b h w c"]:
    """The levels whose likelihood it is."""
    reduced = image >> (8 - vae.config.target_bits) if vae.config.target_bits < 8 else image
    return reduced.astype(jnp.int32)


def infer(
    vae: Vae, params: Params, image: UInt8[Array, "b h w c"], sources: Sequence[Source], keep: Keep
) -> tuple[Float[Array, "b h w o"], list[PyTree]]:
    """The outputs, and `keep` of each layer, where layers may draw from the posterior of this image."""
    skips = network.bottom_up(vae.net, params, inputs(vae, image))
    return _cropped(vae, *network.top_down(vae.net, params, skips, sources, keep))


def generate(
    vae: Vae, params: Params, sources: Sequence[Source], keep: Keep = lambda draw: None
) -> tuple[Float[Array, "b h w o"], list[PyTree]]:
    """The outputs, and `keep` of each layer, from the prior or from given latents."""
    return _cropped(vae, *network.top_down(vae.net, params, None, sources, keep))


def bound(
    vae: Vae, params: Params, image: UInt8[Array, "b h w c"], keys: Key[Array, " b"]
) -> tuple[Float[Array, " b"], Float[Array, "l b"]]:
    """-log p(x | z) of a draw of z from the posterior, and the divergence of each layer, in nats per image (eq. 5)."""
    sources = network.posterior_sources(keys, vae.num_layers)
    raw, kl = infer(vae, params, image, sources, kl_of_image)
    return vae.output.nats(raw, target(vae, image)), jnp.stack(kl)


def kl_of_image(draw: Draw) -> Float[Array, " b"]:
    """A layer's divergence in nats per image."""
    assert draw.kl is not None
    return draw.kl.sum((1, 2, 3))


def _cropped(vae: Vae, raw: Array, kept: list[PyTree]) -> tuple[Array, list[PyTree]]:
    height, width, _ = vae.facts.shape
    top, left = levels.margins(vae.config, vae.facts.shape)
    return raw[:, top : top + height, left : left + width], kept
