"""The golden networks with their parameters in our names and their latents, noise and images in our layout."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from bitsperdim.facts import Facts
from vdvae import convert, levels, vae
from vdvae.config import ModelConfig

LN2 = 0.6931472


class Golden(NamedTuple):
    model: vae.Vae
    params: dict
    image: np.ndarray  # levels, uint8 NHWC
    arrays: dict

    def tensors(self, prefix):
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def layers(self, prefix):
        """[b, c, h, w] of every layer -> a list of [b, h, w, c]."""
        count = int(self.arrays["n_layers"])
        return [np.moveaxis(self.arrays[f"{prefix}/{i:02}"], 1, -1) for i in range(count)]

    def converted(self, prefix):
        from_torch = {"efficient": convert.efficient_from_torch, "vdvae": convert.baseline_from_torch}
        return from_torch[self.model.config.style](self.tensors(prefix), self.model.net)

    def compare_norms(self, found, recorded, limit=1e-3):
        """The norm of each tensor of the file; here those of like layers are stacked."""
        filled = {
            f"norm/{name}": np.full_like(tensor, recorded[name]) for name, tensor in self.tensors("param/").items()
        }
        expected = jax.tree.leaves(self._replace(arrays=filled).converted("norm/"))
        for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), expected, strict=True):
            is_stacked = any(getattr(part, "key", "") in ("layers", "blocks", "skips") for part in path)
            ours, theirs = (np.reshape(leaf, (len(leaf) if is_stacked else 1, -1)) for leaf in (ours, theirs))
            where = jax.tree_util.keystr(path)
            np.testing.assert_allclose(np.linalg.norm(ours, axis=1), theirs[:, 0], rtol=limit, atol=1e-9, err_msg=where)


def efficient_config(**changes):
    """The hierarchy of the golden networks: 4x4, 16x16, and 32x32 in two parts of one and two cells a block."""
    hierarchy = {
        "strides": (1, 4, 2, 1),
        "layers": (1, 2, 1, 2),
        "skips": (1, 1, 1, 1),
        "blocks": (1, 1, 1, 2),
        "widths": (24, 16, 12, 12),
        "bottlenecks": (0.25, 0.5, 0.5, 1.0),
        "kernels": (1, 3, 3, 3),
        "latents": (4, 4, 4, 4),
        "cells": (1, 1, 2, 1),
    }
    return ModelConfig(**hierarchy | {"mixtures": 4, "latent_beta": LN2, "output_beta": LN2} | changes)


@pytest.fixture(scope="session")
def load_efficient(golden):
    def load(name):
        arrays = golden(f"vdvae/{name}")
        shape, bits, changes = (32, 32, 3), 8, {"bins": "published_efficient"}
        if "5bit" in name:
            bits = 5
            changes |= {"latent_beta": 0.4, "output_beta": 0.4, "min_log_scale": -3.0}
        if "mnist" in name:
            # The padded image is what was recorded; ours is the 28x28 one in its middle.
            shape, bits, changes = (28, 28, 1), 1, {"output": "bernoulli"}
        model = vae.make(efficient_config(**changes), Facts(shape, 2**bits))
        image = arrays["images_uint8_nhwc"]
        image = image[:, 2:30, 2:30] if bits == 1 else image >> (8 - bits)
        found = Golden(model, {}, image, arrays)
        return found._replace(params=found.converted("param/"))

    return load


@pytest.fixture(scope="session")
def efficient(load_efficient):
    return load_efficient("evdvae_unbounded_8bit_std")


@pytest.fixture(scope="session")
def baseline(golden):
    arrays = golden("vdvae/openai_vdvae_8bit")
    published = json.loads(str(arrays["config_json"]))
    hierarchy = levels.from_block_strings(published["dec_blocks"], published["enc_blocks"], 32, 4)
    exponential = {"latent": "log_std", "latent_beta": 1.0, "output_scale": "log_std", "output_beta": 1.0}
    whiten = (120.63838, 64.16736)
    config = ModelConfig(
        **hierarchy,
        **exponential,
        min_log_scale=-7.0,
        mixtures=4,
        constants_up_to=16,
        whiten=whiten,
        bins="published_vdvae",
    )
    model = vae.make(config, Facts((32, 32, 3), 256))
    found = Golden(model, {}, arrays["images_uint8_nhwc"], arrays)
    return found._replace(params=found.converted("param/"))
