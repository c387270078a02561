"""Images divided by rows over devices: the same numbers, and neighbours alone exchange rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bitsperdim import config_files, program, sharding, trainer
from bitsperdim.errors import InputError
from vqvae2.autoencoder import Decoder, Encoder

SIZES = {"stride": 4, "hidden": 4, "residual": 2, "layers": 1}


@pytest.fixture(scope="module")
def case():
    """An autoencoder without codes, 32 rows to 8 and back: parameters, images, loss and its gradients."""
    encoder, decoder = Encoder(**SIZES), Decoder(features=3, **SIZES)
    x = jax.random.normal(jax.random.key(0), (2, 32, 8, 3))

    def init(key):
        params = encoder.init(key, x)
        return params, decoder.init(key, encoder.apply(params, x))

    def loss(params, x):
        return jnp.square(decoder.apply(params[1], encoder.apply(params[0], x)) - jnp.sin(x)).mean()

    return jax.jit(init)(jax.random.key(1)), x, jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def by_rows(case, sub_mesh):
    """The gradients as an accelerator's program, compiled for two rows of the batch times four parts of the image."""
    params, x, loss = case
    mesh = sub_mesh(2, spatial=4)

    def divided(params, x):
        with sharding.by_rows(mesh):
            return loss(params, x)

    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.device_put(params, place), jax.device_put(x, sharding.over_batch(mesh))
    with sharding.made_for("gpu"):
        return jax.jit(divided, out_shardings=place).lower(*arguments).compile(), arguments


def test_loss_and_gradients_are_those_of_whole_images(case, by_rows):
    params, x, loss = case
    compiled, arguments = by_rows
    (value, gradients), (expected, others) = compiled(*arguments), jax.jit(loss)(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, other in zip(*map(jax.tree.leaves, (gradients, others)), strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-6)


def test_neighbours_exchange_rows_and_nobody_gathers_them(by_rows):
    assert set(program.traffic(by_rows[0].as_text())) == {"all-reduce", "collective-permute"}


def test_a_stage_whose_model_sees_pixels_in_order_is_refused_by_name(tmp_path):
    values = config_files.load("flows_digits:tiny")
    values.mesh = {"data": -1, "spatial": 2}
    with pytest.raises(InputError, match=r"mesh\.spatial=2 divides images by rows, which the model of stage 'model'"):
        trainer.train(values, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
