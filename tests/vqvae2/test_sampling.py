"""Ancestral sampling against exact probabilities, and against itself in another batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import config_files, rng, sharding
from bitsperdim import run as run_lib
from vqvae2 import chain as chain_lib
from vqvae2 import sampling

NUM_CODES = 3


def chain(codes):
    """A Markov chain along raster order: its logits depend on the code before, and on the position."""
    flat = codes.reshape(len(codes), -1)
    previous = jnp.pad(flat, ((0, 0), (1, 0)))[:, :-1]
    table = jax.random.normal(jax.random.key(5), (flat.shape[1], NUM_CODES, NUM_CODES))
    return table[jnp.arange(flat.shape[1]), previous].reshape(*codes.shape, NUM_CODES)


def draw(key, ids, temperature=1.0):
    noise = sampling.gumbel_noise(key, ids, NUM_CODES)
    return sampling.sample_codes(sampling.whole(chain), noise, (len(ids), 1, 3), temperature)


def test_grids_come_as_often_as_they_are_likely():
    count = 20_000
    drawn = np.asarray(jax.jit(draw)(jax.random.key(0), jnp.arange(count))).reshape(count, 3) @ np.array([9, 3, 1])
    grids = jnp.array(list(np.ndindex(3, 3, 3)))[:, None, :]
    log_probs = jax.nn.log_softmax(chain(grids))
    likely = np.asarray(jnp.exp(jnp.take_along_axis(log_probs, grids[..., None], -1).sum((1, 2, 3))))
    frequency = np.bincount(drawn, minlength=27) / count
    # Five standard errors of a frequency.
    np.testing.assert_array_less(np.abs(frequency - likely), 5 * np.sqrt(likely / count) + 1e-12)


def test_a_sample_does_not_depend_on_its_batch():
    key, ids = jax.random.key(1), jnp.arange(7)
    np.testing.assert_array_equal(draw(key, ids)[4:6], draw(key, ids[4:6]))


def test_noise_differs_between_positions():
    noise = sampling.gumbel_noise(jax.random.key(1), jnp.arange(2), NUM_CODES)
    assert jnp.abs(noise(jnp.int32(0)) - noise(jnp.int32(1))).min() > 1e-3


def test_noise_differs_between_levels(tmp_path):
    """Under weights of zero a code is where the largest of its noise is, whatever the level."""
    config = config_files.load("vqvae2_photos:tiny")
    # A grid of 2x3 above, whose odd side is halved.
    config.bottom.model.conditioning.update({"widths": (8, 8), "bottlenecks": (8, 8)})
    run = run_lib.check(tmp_path, config)
    facts = {"shape": [16, 24, 3], "levels": 256, "num_classes": 0, "variance": 0.3}
    run_lib.write_json(run.folder("autoencoder") / "data.json", facts)
    mesh, drawn = sharding.make_mesh(run.config.mesh), {}
    for level, grid in chain_lib.grids(run).items():
        zero = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(run.stage(level).model(run).init, jax.random.key(0)),
        )
        above = (np.zeros((8, 2, 3), np.int32),) if level == "bottom" else ()
        codes, _ = chain_lib.draw(run, level, mesh)(*zero, jax.random.key(3), jnp.arange(8), above, None, 1.0)
        assert codes.shape == (8, *grid)
        drawn[level] = np.asarray(codes).reshape(8, -1)[:, :4]
    assert (drawn["top"] != drawn["bottom"]).mean() > 0.7
    assert len(np.unique(drawn["top"])) > 8


def test_noise_is_that_of_predictive_sampling_with_its_long_tail():
    """46 random bits each, not 23: the latter end at 16, and codes less likely than 1e-7 would never be drawn."""
    key, ids = jax.random.key(1), jnp.arange(3)
    noise = sampling.gumbel_noise(key, ids, NUM_CODES)
    own = jax.random.fold_in(jax.random.fold_in(rng.for_purpose(key, "gumbel"), 2), 5)
    expected = jax.random.gumbel(own, (NUM_CODES,), mode="high")
    np.testing.assert_array_equal(noise(jnp.int32(5))[2], expected)
    assert (expected != jax.random.gumbel(own, (NUM_CODES,))).any()


def test_temperature_zero_takes_the_likeliest_code_each_time():
    greedy = np.asarray(draw(jax.random.key(2), jnp.arange(2), temperature=0.0))
    expected = np.zeros((2, 1, 3), int)
    for position in range(3):
        expected[:, 0, position] = np.asarray(chain(jnp.asarray(expected)))[:, 0, position].argmax(-1)
    np.testing.assert_array_equal(greedy, expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2}, {"temperature": 0.0}])
def test_forecasts_change_the_calls_and_not_the_codes(options):
    key, ids, shape = jax.random.key(3), jnp.arange(50), (50, 2, 3)
    shift = jnp.arange(50) % NUM_CODES  # what each sample is given beside its codes

    def logits(codes, shift):
        return chain(codes) + 2.0 * jax.nn.one_hot(shift, NUM_CODES)[:, None, None]

    noise, network = sampling.gumbel_noise(key, ids, NUM_CODES), sampling.whole(lambda codes: logits(codes, shift))
    expected = sampling.sample_codes(network, noise, shape, **options)
    codes, calls = sampling.sample_codes_predictively(logits, key, ids, shift, (2, 3, NUM_CODES), **options)
    np.testing.assert_array_equal(codes, expected)
    assert calls.min() >= 1 and calls.max() <= 6
    assert calls.mean() < 5
