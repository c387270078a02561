"""Noise that belongs to (seed, step, purpose, example), whatever batch or device the example is in."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bitsperdim import rng

KEYS = rng.per_example(rng.for_purpose(rng.step_key(0, 0), "dropout"), jnp.arange(64))


def test_no_two_of_seed_step_purpose_and_example_share_a_key():
    keys = [
        rng.per_example(rng.for_purpose(rng.step_key(seed, step), purpose), jnp.arange(5))
        for seed, step, purpose in itertools.product(range(3), range(5), ("dropout", "flip", "revival_top"))
    ]
    words = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(words, axis=0)) == 3 * 5 * 3 * 5


def test_a_purpose_is_folded_in_as_the_standard_crc_32():
    # 0xCBF43926 is the published check value of CRC-32 for this text; Python's own hash differs in every process.
    key = jax.random.key(7)
    expected = jax.random.fold_in(key, 0xCBF43926)
    assert (rng.for_purpose(key, "123456789") == expected).all()


def test_the_noise_of_an_example_follows_it_to_any_place_in_the_batch():
    key, x = jax.random.key(3), jax.random.normal(jax.random.key(4), (16, 10))
    order = np.random.default_rng(0).permutation(16)
    whole = rng.dropout(rng.per_example(key, jnp.arange(16)), 0.5, x)
    shuffled = rng.dropout(rng.per_example(key, jnp.asarray(order)), 0.5, x[order])
    np.testing.assert_array_equal(shuffled, whole[order])
    alone = rng.dropout(rng.per_example(key, jnp.asarray([5])), 0.5, x[5:6])
    np.testing.assert_array_equal(alone, whole[5:6])


def test_dropout_is_the_same_on_eight_devices_as_on_one(sub_mesh):
    x = jax.random.normal(jax.random.key(4), (64, 32))
    over = jax.sharding.NamedSharding(sub_mesh(8), P(("data", "fsdp")))
    drop = jax.jit(lambda position, x: rng.dropout(rng.per_example(jax.random.key(1), position), 0.3, x))
    on_eight = drop(jax.device_put(jnp.arange(64), over), jax.device_put(x, over))
    assert len(on_eight.sharding.device_set) == 8
    np.testing.assert_array_equal(on_eight, drop(jnp.arange(64), x))


def test_dropout_takes_its_share_and_keeps_the_mean():
    dropped = np.asarray(rng.dropout(KEYS, 0.25, jnp.full((64, 1000), 3.0)))
    assert set(np.unique(dropped)) == {0.0, 4.0}  # 3 / (1 - 0.25)
    # 64,000 draws: five standard deviations of the share are 0.0086.
    assert abs((dropped == 0.0).mean() - 0.25) < 0.0086
    np.testing.assert_allclose(dropped.mean(), 3.0, rtol=0.015)


def test_dropout_of_different_examples_is_independent():
    kept = np.asarray(rng.dropout(KEYS, 0.5, jnp.ones((64, 1000)))) > 0
    correlation = np.corrcoef(kept)[np.triu_indices(64, 1)]
    assert abs(correlation).max() < 0.17  # five standard deviations of 1/sqrt(1000)


def test_without_a_rate_nothing_is_dropped():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    np.testing.assert_array_equal(rng.dropout(KEYS, 0.0, x), x)
