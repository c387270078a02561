"""The objective of the autoencoder against its formula, and what training images go through before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.augment import ColourConfig
from vqvae2 import autoencoder_stage
from vqvae2.config import AutoencoderConfig
from vqvae2.facts import Facts

VARIANCE, BATCH = 0.3, 16
ABOUT = Facts((8, 8, 3), 256, 0, VARIANCE)
SMALL = {"hidden": 8, "residual": 4, "residual_layers": 1, "code_dim": 4, "num_codes": 6, "commitment": 0.7}


@pytest.fixture(scope="module")
def images():
    """Of middle values, which no change of colour cuts off."""
    return np.random.default_rng(1).integers(64, 192, (BATCH, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def loss():
    """`loss(**changes)` -> images -> objective and parts, with weights that depend on the strides alone."""

    def of(**changes):
        draw = np.random.default_rng(0)
        model = autoencoder_stage.make(AutoencoderConfig(**SMALL | changes), ABOUT, BATCH)
        scale = lambda leaf: (2.0 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.1
        normal = lambda leaf: (scale(leaf) * draw.standard_normal(leaf.shape)).astype(leaf.dtype)
        params, extra = jax.tree.map(normal, jax.eval_shape(model.init, jax.random.key(0)))
        compiled = jax.jit(lambda batch: model.loss(params, extra, batch, jax.random.key(1), jnp.int32(0)))

        def evaluate(images):
            objective, aux = compiled({"image": images, "position": np.arange(BATCH, dtype=np.int32)})
            return float(objective), jax.device_get(aux.parts)

        return evaluate

    return of


def test_the_objective_is_the_error_over_the_variance_and_beta_times_every_commitment(loss, images):
    """Of its parts, whose own values are tested beside the golden ones."""
    objective, parts = loss(strides=(2, 2))(images)
    of_levels = parts["commitment_top"].mean() + parts["commitment_bottom"].mean()
    assert objective == pytest.approx(parts["mse"].mean() / VARIANCE + 0.7 * of_levels, rel=1e-5)
    assert min(parts["commitment_top"].mean(), parts["commitment_bottom"].mean()) > 0.01


def test_training_images_are_mirrored_half_of_the_time_and_the_variance_may_be_left_out(loss, images):
    plain = loss(strides=(2,), scale_by_variance=False)
    objective, parts = plain(images)
    assert objective == pytest.approx(parts["mse"].mean() + 0.7 * parts["commitment_top"].mean(), rel=1e-5)
    found, mirrored = loss(strides=(2,), flip=True)(images)[1]["mse"], plain(images[:, :, ::-1])[1]["mse"]
    is_plain, is_mirrored = (np.isclose(found, errors, rtol=1e-5) for errors in (parts["mse"], mirrored))
    assert (is_plain ^ is_mirrored).all() and 3 < is_mirrored.sum() < 13


def test_colours_are_changed_by_shares_of_the_whole_range(loss, images):
    """0.2 of [0, 1] is 0.4 of [-1, 1)."""
    found = loss(strides=(2,), colour=ColourConfig(brightness=0.2))(images)[1]["pixel_mean"]
    change = found - ((images + 0.5) / 128.0 - 1.0).mean((1, 2, 3))
    assert 0.3 < np.abs(change).max() <= 0.4 and change.min() < 0 < change.max()
