"""The prior against a golden PixelSNAIL, causality by perturbation, dropout that belongs to the example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import causal, rng
from vqvae2 import sampling
from vqvae2.conditioning import Conditioner, ConditioningStack
from vqvae2.prior import KEPT, PixelSnail, Prior, background, nll

GOLDEN = PixelSnail(
    num_codes=12,
    embedding=12,
    hidden=8,
    residual=8,
    layers=4,
    kernel=2,
    activation="concat_elu",
    attention_every=2,
    attention_heads=2,
    attention_features=8,
    num_classes=5,
)


@pytest.fixture
def data(golden):
    return golden("vqvae2/pixelsnail_stack")


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def golden_params(data):
    """The golden network reads one-hot codes: an embedding whose table is the identity."""

    def conv(name):
        return {"kernel": data[f"param/{name}/w"].transpose(2, 3, 1, 0), "bias": data[f"param/{name}/b"]}

    def gated(name):
        return {"conv_in": conv(f"{name}/c1"), "conv_out": conv(f"{name}/c2")}

    params = {"embedding": {"table": np.eye(12, dtype=np.float32)}, "head": conv("head")}
    params["stem"] = {"above": conv("in_d"), "left": conv("in_dr")}
    for i in range(4):
        name = f"blk{i // 2}/res{i % 2}"
        params[f"layer_{i}"] = gated(name) | {"class_bias": {"table": data[f"param/{name}/cond"]}}
    for i in range(2):
        params[f"attention_{i}"] = {
            "key_value_gated": gated(f"blk{i}/kv"),
            "key_value_projection": conv(f"blk{i}/kvproj"),
            "query_gated": gated(f"blk{i}/q"),
            "query_projection": conv(f"blk{i}/qproj"),
            "output": gated(f"blk{i}/out") | {"aux": conv(f"blk{i}/out/aux")},
        }
    return params


def test_every_golden_activation(data):
    variables, codes = {"params": golden_params(data)}, data["codes"]
    logits, captured = GOLDEN.apply(variables, codes, label=data["label"], capture_intermediates=True)
    names = {"stem": "stem"} | {f"layer_{i}": f"blk{i // 2}/res{i % 2}" for i in range(4)}
    names |= {f"attention_{i}": f"blk{i}/out" for i in range(2)}
    for ours, theirs in names.items():
        found = captured["intermediates"][ours]["__call__"][0]
        np.testing.assert_allclose(found, nhwc(data[f"act/{theirs}"]), atol=1e-5, err_msg=ours)
    np.testing.assert_allclose(background(8, 8), nhwc(data["background"]), atol=1e-7)
    np.testing.assert_allclose(logits, nhwc(data["logits"]), atol=1e-5)
    np.testing.assert_allclose(nll(logits, codes).sum() / codes.size, data["nll_nats_mean"], rtol=1e-5)


@pytest.mark.parametrize("draw, temperature", [(0, 1.0), (1, 0.9), (None, 0.0)], ids=["T=1", "T=0.9", "greedy"])
def test_golden_samples(data, draw, temperature):
    params, label = golden_params(data), data["label"]
    gumbel = jnp.asarray(data["gumbel"][draw or 0])
    expected = data["greedy_codes"] if draw is None else data["sampled_codes"][draw]

    @jax.jit
    def sample(temperature):
        logits_fn = lambda codes: GOLDEN.apply({"params": params}, codes, label=label)
        return sampling.sample_codes(logits_fn, lambda position: gumbel[:, position], (3, 8, 8), temperature)

    np.testing.assert_array_equal(sample(temperature), expected)

    @jax.jit
    def sample_cached(temperature):
        def logits_fn(codes, cell, kept):
            logits, kept = GOLDEN.apply({"params": params} | kept, codes, label=label, cell=cell, mutable=KEPT)
            return logits[:, 0, 0], kept

        return sampling.sample_codes_cached(logits_fn, lambda position: gumbel[:, position], (3, 8, 8), temperature)

    np.testing.assert_array_equal(sample_cached(temperature), expected)


def tiny_top(**changes):
    settings = {"num_codes": 6, "embedding": 4, "hidden": 8, "residual": 12, "layers": 2, "kernel": 3, "num_classes": 3}
    settings |= {"attention_every": 2, "attention_heads": 2, "attention_features": 4, "output_layers": 1}
    return Prior(PixelSnail(**settings | changes))


def tiny_bottom(**changes):
    settings = {"num_codes": 6, "embedding": 4, "hidden": 8, "residual": 12, "layers": 2, "kernel": 3}
    stack = ConditioningStack(2, (8, 8), (4, 4), **changes)
    return Prior(PixelSnail(**settings), Conditioner(6, 4, stack))


def effect_of_each_code(logits_fn, codes):
    """effect[p, q]: the largest change of the logits at raster position q when the code at p is replaced."""
    cells = codes[0].size
    changed = jnp.tile(codes.reshape(1, -1), (cells + 1, 1))
    changed = changed.at[jnp.arange(cells), jnp.arange(cells)].add(1) % 6
    logits = logits_fn(changed.reshape(-1, *codes.shape[1:])).reshape(cells + 1, cells, -1)
    return np.asarray(jnp.abs(logits[:-1] - logits[-1:]).max(-1))


def test_top_prior_depends_on_all_earlier_codes_and_no_other(random_variables):
    prior, codes = tiny_top(), jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6)
    label = lambda codes: jnp.ones(len(codes), int)
    variables = random_variables(prior, codes, label=label(codes))
    effect = effect_of_each_code(jax.jit(lambda codes: prior.apply(variables, codes, label=label(codes))), codes)
    earlier = np.triu(np.ones((16, 16), bool), 1)
    assert effect[~earlier].max() < 1e-5
    # Row wraps included: the first cell of a row sees the last one of the row above.
    assert effect[earlier].min() > 1e-4


def test_bottom_prior_depends_on_its_quadrant_and_no_other(random_variables):
    """Without attention: the cells to the left, and the rows above up to one column to the right."""
    prior, codes = tiny_bottom(), jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6)
    upper = lambda codes: (jnp.ones((len(codes), 2, 2), int),)
    variables = random_variables(prior, codes, upper(codes))
    effect = effect_of_each_code(jax.jit(lambda codes: prior.apply(variables, codes, upper(codes))), codes)
    for p, q in np.ndindex(16, 16):
        (a, b), (i, j) = divmod(p, 4), divmod(q, 4)
        visible = (a < i and b <= j + 1) or (a == i and b < j)
        assert (effect[p, q] > 1e-4) if visible else (effect[p, q] < 1e-5), (p, q)


def test_each_code_above_reaches_all_cells_below_it(random_variables):
    prior, codes = tiny_bottom(norm="none"), jnp.zeros((1, 8, 8), int)
    top, middle = jnp.zeros((1, 2, 2), int), jnp.zeros((1, 4, 4), int)
    variables = random_variables(prior, codes, (top, middle))
    logits = jax.jit(lambda top, middle: prior.apply(variables, codes, (top, middle)))
    base = logits(top, middle)
    for i, j in np.ndindex(4, 4):
        effect = np.abs(logits(top, middle.at[0, i, j].set(3)) - base)[0].max(-1)
        assert effect[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].min() > 1e-4
        effect = np.abs(logits(top.at[0, i // 2, j // 2].set(3), middle) - base)[0].max(-1)
        assert effect[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].min() > 1e-4


def test_logits_of_a_kept_condition_are_those_of_the_whole(random_variables):
    prior, codes = tiny_bottom(), jax.random.randint(jax.random.key(1), (2, 4, 4), 0, 6)
    upper = (jax.random.randint(jax.random.key(2), (2, 2, 2), 0, 6),)
    variables = random_variables(prior, codes, upper)
    condition = prior.apply(variables, upper, method="condition")
    logits = prior.apply(variables, codes, condition, method="logits")
    np.testing.assert_allclose(logits, prior.apply(variables, codes, upper), atol=1e-5)


def cell_logits(prior, variables, codes, **named):
    """Logits of all cells, evaluated one after another."""
    _, height, width = codes.shape

    @jax.jit
    def evaluate(codes, row, column, kept):
        cell = causal.Cell(row, column, height, width)
        return prior.apply(variables | kept, codes, cell, **named, method="cell_logits", mutable=KEPT)

    kept, logits = {}, []
    for row, column in np.ndindex(height, width):
        # What comes later must not matter, whatever it holds.
        flat = np.asarray(codes).reshape(len(codes), -1)
        known = np.where(np.arange(height * width) < row * width + column, flat, 5).reshape(codes.shape)
        if column == 0 and kept:
            kept = dict(kept) | {causal.ROWS: causal.next_row(kept[causal.ROWS])}
        here, kept = evaluate(jnp.asarray(known), jnp.int32(row), jnp.int32(column), dict(kept))
        logits.append(here)
    return jnp.stack(logits, 1).reshape(*codes.shape, -1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_every": 0, "num_classes": 0, "kernel": 2, "output_layers": 0},
        {"attention_every": 1, "activation": "concat_elu", "remat": True},
        {"dtype": jnp.bfloat16},
    ],
    ids=["attention", "none", "concat_elu", "bfloat16"],
)
def test_cell_by_cell_the_logits_are_those_of_the_whole_grid(random_variables, changes):
    prior, codes = tiny_top(**changes), jax.random.randint(jax.random.key(1), (2, 3, 5), 0, 6)
    label = jnp.array([0, 2]) if prior.network.num_classes else None
    variables = random_variables(prior, codes, label=label)
    expected = prior.apply(variables, codes, label=label)
    found = cell_logits(prior, variables, codes, label=label)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.1 if "dtype" in changes else 2e-5)


def test_cell_by_cell_under_a_condition(random_variables):
    prior, codes = tiny_bottom(), jax.random.randint(jax.random.key(1), (2, 8, 4), 0, 6)
    upper = (jax.random.randint(jax.random.key(2), (2, 4, 2), 0, 6),)
    variables = random_variables(prior, codes, upper)
    condition = prior.apply(variables, upper, method="condition")
    found = cell_logits(prior, variables, codes, conditioning=condition)
    np.testing.assert_allclose(found, prior.apply(variables, codes, upper), atol=2e-5)


def test_the_class_moves_the_logits(random_variables):
    prior, codes = tiny_top(), jnp.zeros((2, 4, 4), int)
    variables = random_variables(prior, codes, label=jnp.zeros(2, int))
    logits = prior.apply(variables, codes, label=jnp.array([0, 2]))
    assert jnp.abs(logits[0] - logits[1]).min(-1).min() > 1e-4


def test_dropout_belongs_to_the_example_and_is_off_without_keys(random_variables):
    prior = tiny_top(dropout=0.5, num_classes=0, layers=1, attention_every=1)
    codes = jnp.tile(jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6), (4, 1, 1))
    variables = random_variables(prior, codes)
    keys = rng.per_example(jax.random.key(3), jnp.arange(4))
    apply = jax.jit(lambda codes, keys: prior.apply(variables, codes, keys=keys))
    noisy = apply(codes, keys)
    assert jnp.abs(noisy[0] - noisy[1]).max() > 1e-3
    np.testing.assert_allclose(apply(codes, keys[::-1]), noisy[::-1], atol=1e-5)
    quiet = apply(codes, None)
    np.testing.assert_allclose(quiet, jnp.broadcast_to(quiet[:1], quiet.shape), atol=1e-5)


def test_likelihoods_of_all_grids_sum_to_one(random_variables):
    """Two codes on a 2 x 2 grid: sixteen grids."""
    prior = tiny_top(num_codes=2, num_classes=0)
    grids = jnp.array(list(np.ndindex(2, 2, 2, 2))).reshape(16, 2, 2)
    variables = random_variables(prior, grids)
    log_probs = -nll(jax.jit(prior.apply)(variables, grids), grids)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(), 1.0, rtol=1e-5)


def test_uniform_logits_cost_the_logarithm_of_the_number_of_codes():
    codes = jnp.arange(6).reshape(1, 2, 3)
    np.testing.assert_allclose(nll(jnp.zeros((1, 2, 3, 512)), codes) / 6, 6.2383246, rtol=1e-6)


def test_computing_in_bfloat16_gives_float32_logits_close_to_those_of_float32(random_variables):
    codes = jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6)
    low, full = tiny_top(dtype=jnp.bfloat16, num_classes=0), tiny_top(num_classes=0)
    variables = random_variables(full, codes)
    logits, captured = jax.jit(lambda codes: low.apply(variables, codes, capture_intermediates=True))(codes)
    assert captured["intermediates"]["network"]["layer_1"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(full.apply)(variables, codes), atol=0.2)
