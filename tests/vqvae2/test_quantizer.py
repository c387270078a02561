"""The quantiser against the golden updates, revival against what it promises, sums against shards and micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vqvae2 import quantizer
from vqvae2.quantizer import Codebook, Statistics

DECAY, EPSILON = 0.99, 1e-5
paper_update = functools.partial(quantizer.update, decay=DECAY, epsilon=EPSILON, revival_threshold=0.0)


def statistics(z, codes, num_codes, position=None, key=0, global_batch=None):
    """With the whole batch in order, unless told otherwise."""
    position = jnp.arange(len(z)) if position is None else position
    return quantizer.statistics(
        z,
        codes,
        num_codes=num_codes,
        key=jax.random.key(key),
        position=position,
        global_batch=global_batch or len(z),
    )


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


@pytest.fixture
def batch():
    """Encoder vectors of eight examples, their codes under a small codebook, and its size."""
    codebook = quantizer.init(jax.random.key(1), 12, 5)
    z = jax.random.normal(jax.random.key(0), (8, 3, 4, 5))
    return z, quantizer.quantize(codebook.embedding, z).codes, 12


def test_five_golden_updates(golden):
    data = golden("vqvae2/ema_quantizer_debiased")
    embedding = jnp.asarray(data["codebook_init"].T)
    num_codes, dim = embedding.shape
    codebook = Codebook(embedding, jnp.zeros(num_codes), jnp.zeros((num_codes, dim)), jnp.zeros((), jnp.int32))
    for t in range(5):
        np.testing.assert_allclose(codebook.embedding, data["codebook_before"][t].T, rtol=1e-4, atol=1e-7)
        z = jnp.asarray(data["inputs"][t])

        def objective(z, embedding=codebook.embedding, upstream=data["upstream_grad"][t]):
            quantized = quantizer.quantize(embedding, z)
            loss = float(data["beta"]) * quantized.squared_error.mean()
            return loss + (upstream * quantized.straight_through).sum(), (quantized, loss)

        gradient, (quantized, loss) = jax.grad(objective, has_aux=True)(z)
        np.testing.assert_array_equal(quantized.codes, data["codes"][t])
        np.testing.assert_allclose(quantized.straight_through, data["quantized"][t], atol=1e-5)
        np.testing.assert_allclose(loss, data["loss"][t], rtol=1e-5)
        np.testing.assert_allclose(gradient, data["grad_input"][t], rtol=1e-3, atol=1e-6)

        sums = statistics(z, quantized.codes, num_codes)
        np.testing.assert_array_equal(sums.counts, data["counts"][t])
        np.testing.assert_allclose(quantizer.perplexity(sums.counts), data["perplexity"][t], rtol=1e-5)
        codebook = paper_update(codebook, sums)
        np.testing.assert_allclose(codebook.ema_counts, data["hidden_cluster_size"][t], rtol=1e-4)
        np.testing.assert_allclose(codebook.ema_sums, data["hidden_dw"][t].T, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(codebook.embedding, data["codebook_after"][t].T, rtol=1e-4, atol=1e-7)


def test_the_first_of_equal_codes_wins():
    embedding = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    z = jnp.array([[0.9, 0.1], [0.5, 0.4]]).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(quantizer.quantize(embedding, z).codes, [[[0, 1]]])


def test_codes_are_decided_in_float32_when_the_encoder_computes_in_bfloat16():
    """Two codes closer together than bfloat16 can tell: 1 and 1 + 2^-10."""
    embedding = jnp.array([[1.0 + 2**-10], [1.0]])
    quantized = quantizer.quantize(embedding, jnp.ones((1, 1, 1, 1), jnp.bfloat16))
    assert quantized.codes.item() == 1 and quantized.straight_through.dtype == jnp.float32


def test_perplexity_does_not_collapse_in_the_first_steps():
    """As it does without debiasing, where codes that the first batch misses leave for 1e5 times their size."""
    codebook = quantizer.init(jax.random.key(0), 32, 16)
    port = {"embedding": codebook.embedding, "counts": jnp.zeros(32), "sums": codebook.embedding}
    for t in range(5):
        z = jax.random.normal(jax.random.key(t), (2, 8, 8, 16))
        hits = statistics(z, quantizer.quantize(codebook.embedding, z).codes, 32)
        codebook = paper_update(codebook, hits)
        port_hits = statistics(z, quantizer.quantize(port["embedding"], z).codes, 32)
        port = not_debiased(port, port_hits)
    assert quantizer.perplexity(hits.counts) > 10.0
    assert quantizer.perplexity(port_hits.counts) < 2.0


def not_debiased(state, hits):
    counts = DECAY * state["counts"] + (1 - DECAY) * hits.counts
    sums = DECAY * state["sums"] + (1 - DECAY) * hits.sums
    smoothed = (counts + EPSILON) / (counts.sum() + 32 * EPSILON) * counts.sum()
    return {"embedding": sums / smoothed[:, None], "counts": counts, "sums": sums}


def test_without_revival_a_code_that_is_never_hit_becomes_the_zero_vector():
    codebook = quantizer.init(jax.random.key(0), 2, 3)
    hits = Statistics(jnp.array([10.0, 0.0]), jnp.full((2, 3), 5.0) * jnp.array([[1.0], [0.0]]), jnp.ones((2, 3)))
    np.testing.assert_array_equal(paper_update(codebook, hits).embedding[1], 0.0)


@pytest.mark.parametrize("updates", [0, 3, 1000], ids=["first", "early", "late"])
def test_revival_resets_all_three_buffers_and_lasts_a_time_constant(updates):
    """Four codes, the last never hit: revived at once, it stays put for 100 updates and is then drawn again."""
    revive = jax.jit(functools.partial(quantizer.update, decay=DECAY, epsilon=EPSILON, revival_threshold=0.05))
    counts = jnp.array([40.0, 30.0, 30.0, 0.0])
    hits = lambda candidate: Statistics(counts, counts[:, None] * jnp.ones((4, 2)), jnp.full((4, 2), candidate))
    raw = 1.0 - DECAY**updates
    codebook = Codebook(jnp.ones((4, 2)), raw * counts, raw * counts[:, None] * jnp.ones((4, 2)), jnp.int32(updates))

    codebook = revive(codebook, hits(7.0))
    np.testing.assert_allclose(codebook.embedding, [[1, 1], [1, 1], [1, 1], [7, 7]], rtol=1e-4)
    np.testing.assert_allclose(codebook.ema_sums[3] / codebook.ema_counts[3], 7.0, rtol=1e-6)
    assert codebook.ema_counts[3] / (1 - DECAY ** (updates + 1)) > 0.05 * counts.mean()
    for _ in range(99):
        codebook = revive(codebook, hits(9.0))
    np.testing.assert_allclose(codebook.embedding[3], 7.0, rtol=1e-3)
    for _ in range(2):
        codebook = revive(codebook, hits(9.0))
    np.testing.assert_allclose(codebook.embedding[3], 9.0, rtol=1e-3)


def test_a_revived_code_that_is_hit_moves_to_its_hits():
    revive = functools.partial(quantizer.update, decay=DECAY, epsilon=EPSILON, revival_threshold=0.02)
    codebook = Codebook(jnp.ones((2, 1)), jnp.array([20.0, 0.0]), jnp.array([[20.0], [0.0]]), jnp.int32(5000))
    codebook = revive(codebook, Statistics(jnp.array([20.0, 0.0]), jnp.array([[20.0], [0.0]]), jnp.full((2, 1), 4.0)))
    for _ in range(20):
        hits = Statistics(jnp.array([10.0, 10.0]), jnp.array([[10.0], [50.0]]), jnp.zeros((2, 1)))
        codebook = revive(codebook, hits)
    assert 4.7 < codebook.embedding[1, 0] < 5.0


def test_candidates_are_encoder_vectors_of_many_examples(batch):
    z, codes, num_codes = batch
    candidates = np.asarray(statistics(z, codes, num_codes).candidates)
    equal = (np.asarray(z).reshape(8, 12, 1, 5) == candidates).all(-1)
    assert (equal.sum((0, 1)) == 1).all()
    of_example, of_cell = equal.any((1, 2)), equal.any((0, 2))
    assert of_example.sum() >= 4 and of_example[:4].any() and of_example[4:].any()
    assert of_cell[:6].any() and of_cell[6:].any()


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]], [[5, 0, 7], [1, 2, 3, 4, 6]]]
)
def test_statistics_of_micro_batches_add_up_to_those_of_the_batch(batch, parts):
    z, codes, num_codes = batch
    whole = statistics(z, codes, num_codes)
    pieces = [statistics(z[jnp.array(p)], codes[jnp.array(p)], num_codes, jnp.array(p), 0, 8) for p in parts]
    total = functools.reduce(add, pieces)
    np.testing.assert_array_equal(total.counts, whole.counts)
    np.testing.assert_array_equal(total.candidates, whole.candidates)
    np.testing.assert_allclose(total.sums, whole.sums, atol=1e-5)


def test_eight_devices_learn_the_codebook_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = NamedSharding(mesh, PartitionSpec("data"))

    def step(codebook, z, position):
        codes = quantizer.quantize(codebook.embedding, z).codes
        hits = statistics(z, codes, 24, position)
        return quantizer.update(codebook, hits, decay=DECAY, epsilon=EPSILON, revival_threshold=0.1)

    step = jax.jit(step)
    single = sharded = quantizer.init(jax.random.key(0), 24, 5)
    for t in range(4):
        z, position = jax.random.normal(jax.random.key(t), (16, 3, 3, 5)), jnp.arange(16)
        single = step(single, z, position)
        sharded = step(sharded, jax.device_put(z, over_batch), jax.device_put(position, over_batch))
    for name in Codebook._fields:
        np.testing.assert_allclose(getattr(sharded, name), getattr(single, name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_perplexity_of_uniform_and_of_single_use():
    np.testing.assert_allclose(quantizer.perplexity(jnp.full(16, 3.0)), 16.0, rtol=1e-5)
    np.testing.assert_allclose(quantizer.perplexity(jnp.array([5.0, 0.0, 0.0])), 1.0, rtol=1e-5)
    assert quantizer.codes_in_use(jnp.array([5.0, 0.0, 1.0])) == 2
