"""The prior against a golden PixelSNAIL, causality by perturbation, cells against grids, scanned against unrolled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import rng
from vqvae2 import sampling
from vqvae2.attention import CausalAttention, background
from vqvae2.conditioning import Conditioner, ConditioningStack
from vqvae2.layers import Context
from vqvae2.prior import PixelSnail, Prior, incremental, nll
from vqvae2.runs import Manner

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

    stacked = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    layer = lambda name: gated(name) | {"told": {"class_bias": {"table": data[f"param/{name}/cond"]}}}
    attention = lambda name: {
        "key_value_gated": gated(f"{name}/kv"),
        "key_value_projection": conv(f"{name}/kvproj"),
        "query_gated": gated(f"{name}/q"),
        "query_projection": conv(f"{name}/qproj"),
        "output": gated(f"{name}/out") | {"aux": conv(f"{name}/out/aux")},
    }
    groups = {
        "layer": stacked([stacked([layer(f"blk{i}/res{j}") for j in range(2)]) for i in range(2)]),
        "attention": stacked([attention(f"blk{i}") for i in range(2)]),
    }
    stem = {"above": conv("in_d"), "left": conv("in_dr")}
    return {"embedding": {"table": np.eye(12, dtype=np.float32)}, "stem": stem, "groups": groups, "head": conv("head")}


def test_every_golden_activation(data):
    variables, codes = {"params": golden_params(data)}, data["codes"]
    logits, captured = GOLDEN.apply(variables, codes, label=data["label"], capture_intermediates=True)
    captured = captured["intermediates"]
    outputs = {"stem": captured["stem"]["__call__"][0]}
    for i, j in np.ndindex(2, 2):
        outputs[f"blk{i}/res{j}"] = captured["groups"]["layer"]["__call__"][0][i, j]
        outputs[f"blk{i}/out"] = captured["groups"]["attention"]["__call__"][0][i]
    for name, found in outputs.items():
        np.testing.assert_allclose(found, nhwc(data[f"act/{name}"]), atol=1e-5, err_msg=name)
    np.testing.assert_allclose(background(8, 8), nhwc(data["background"]), atol=1e-7)
    np.testing.assert_allclose(logits, nhwc(data["logits"]), atol=1e-5)
    np.testing.assert_allclose(nll(logits, codes).sum() / codes.size, data["nll_nats_mean"], rtol=1e-5)


@pytest.mark.parametrize("draw, temperature", [(0, 1.0), (1, 0.9), (None, 0.0)], ids=["T=1", "T=0.9", "greedy"])
def test_golden_samples(data, draw, temperature):
    params, label = golden_params(data), data["label"]
    gumbel = jnp.asarray(data["gumbel"][draw or 0])
    expected = data["greedy_codes"] if draw is None else data["sampled_codes"][draw]
    logits_fn = lambda codes: GOLDEN.apply({"params": params}, codes, label=label)
    cells = incremental(Prior(GOLDEN), {"params": {"network": params}}, label=label)
    for network in (sampling.whole(logits_fn), cells):
        sample = functools.partial(sampling.sample_codes, network, lambda position: gumbel[:, position], (3, 8, 8))
        np.testing.assert_array_equal(jax.jit(sample)(temperature), expected)


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


@pytest.mark.parametrize("reading", ["quadrant", "causal"])
def test_without_attention_a_quadrant_is_seen_or_in_two_stacks_all_earlier_codes(random_variables, reading):
    """The cells to the left, and the rows above: up to one column to the right, or all of them, row wraps included."""
    settings = {"reading": reading, "kernel": 3 if reading == "quadrant" else 5, "attention_every": 0, "num_classes": 0}
    network, codes = tiny_top(**settings).network, jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6)
    prior = Prior(network, Conditioner(6, 4, ConditioningStack(2, (8, 8), (4, 4))))
    upper = lambda codes: (jnp.ones((len(codes), 2, 2), int),)
    variables = random_variables(prior, codes, upper(codes))
    effect = effect_of_each_code(jax.jit(lambda codes: prior.apply(variables, codes, upper(codes))), codes)
    for p, q in np.ndindex(16, 16):
        (a, b), (i, j) = divmod(p, 4), divmod(q, 4)
        visible = p < q and (reading == "causal" or a == i or b <= j + 1)
        assert (effect[p, q] > 1e-5) if visible else (effect[p, q] < 1e-6), (p, q)


def test_two_stacks_see_as_far_as_their_kernels_reach(random_variables):
    """Every convolution of a 3x3 kernel goes one row up and one column to either side; there are three of them."""
    codes = jax.random.randint(jax.random.key(1), (1, 5, 9), 0, 6)
    prior = tiny_top(reading="causal", kernel=3, layers=1, attention_every=0, num_classes=0)
    variables = random_variables(prior, codes)
    effect = effect_of_each_code(jax.jit(lambda codes: prior.apply(variables, codes)), codes)
    for p, q in np.ndindex(45, 45):
        (a, b), (i, j) = divmod(p, 9), divmod(q, 9)
        left = 0 < j - b <= 3 if a == i else False
        # The step from the vertical to the horizontal stream goes up one row more.
        above = 1 <= i - a <= 4 and abs(j - b) <= 3
        assert (effect[p, q] > 0) == (left or above), (p, q)


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
    network = incremental(prior, variables, **named)
    evaluate, begin_row = jax.jit(network.cell_logits), jax.jit(network.begin_row)
    kept, logits = network.nothing(codes), []
    for row, column in np.ndindex(height, width):
        # What comes later must not matter, whatever it holds.
        flat = np.asarray(codes).reshape(len(codes), -1)
        known = jnp.asarray(np.where(np.arange(height * width) < row * width + column, flat, 5).reshape(codes.shape))
        if column == 0:
            kept = begin_row(known, jnp.int32(row), kept)
        here, kept = evaluate(known, jnp.int32(row), jnp.int32(column), kept)
        logits.append(here)
    return jnp.stack(logits, 1).reshape(*codes.shape, -1)


SCANNED = Manner(scan=True, remat=True)
NETWORKS = {
    "attention": {},
    "none": {"attention_every": 0, "num_classes": 0, "kernel": 2, "output_layers": 0},
    "concat_elu": {"attention_every": 1, "activation": "concat_elu"},
    "a layer over": {"layers": 3, "manner": SCANNED},
    "causal": {"reading": "causal", "attention_every": 0},
    "causal, attention": {"reading": "causal", "layers": 3, "manner": SCANNED},
    "bfloat16": {"dtype": jnp.bfloat16, "manner": SCANNED},
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_cell_by_cell_the_logits_are_those_of_the_whole_grid(random_variables, changes):
    prior, codes = tiny_top(**changes), jax.random.randint(jax.random.key(1), (2, 3, 5), 0, 6)
    label = jnp.array([0, 2]) if prior.network.num_classes else None
    variables = random_variables(prior, codes, label=label)
    expected = prior.apply(variables, codes, label=label)
    found = cell_logits(prior, variables, codes, label=label)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.1 if "dtype" in changes else 2e-5)


@pytest.mark.parametrize(
    "changes",
    [{"output_layers": 2}, {"reading": "causal", "layers": 2, "attention_every": 0, "output_layers": 0}],
    ids=str,
)
def test_scanned_layers_have_the_loss_and_the_gradients_of_unrolled_ones(random_variables, changes):
    """With dropout, whose noise must be that of the same layer, and with blocks of every kind."""
    codes = jax.random.randint(jax.random.key(1), (2, 4, 4), 0, 6)
    upper, label = (jax.random.randint(jax.random.key(2), (2, 2, 2), 0, 6),), jnp.array([0, 2])
    keys = rng.per_example(jax.random.key(3), jnp.arange(2))

    def prior(manner):
        network = tiny_top(**{"layers": 3, "dropout": 0.4, "manner": manner} | changes).network
        return Prior(network, Conditioner(6, 4, ConditioningStack(4, (8,), (4,), "batch", manner=manner)))

    def value_and_grad(manner):
        def loss(params):
            variables, arguments = {"params": params, **extra}, (codes, upper, label, keys)
            logits, _ = prior(manner).apply(variables, *arguments, train=True, mutable=["batch_moments"])
            return nll(logits, codes).mean()

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    variables = random_variables(prior(Manner()), codes, upper, label)
    extra = {"batch_stats": variables["batch_stats"]}
    (expected, gradients), (found, others) = value_and_grad(Manner()), value_and_grad(SCANNED)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), others, gradients)


@pytest.mark.parametrize("manner", [Manner(), SCANNED], ids=["unrolled", "scanned"])
def test_each_layer_has_noise_of_its_own(random_variables, manner):
    """Two layers of the same weights whose input is the same, since they add nothing to it."""
    network = tiny_top(dropout=0.5, num_classes=0, attention_every=0, output_layers=0, manner=manner).network
    codes, keys = jnp.zeros((1, 4, 4), int), rng.per_example(jax.random.key(3), jnp.arange(1))
    params = random_variables(network, codes)["params"]
    layers = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), params["layers"])
    layers["conv_out"] = jax.tree.map(lambda leaf: leaf * (np.arange(16) >= 8), layers["conv_out"])

    def outputs(keys):
        variables = {"params": params | {"layers": layers}}
        _, captured = network.apply(variables, codes, keys=keys, capture_intermediates=True, mutable="intermediates")
        return captured["intermediates"]["layers"]["conv_out"]["__call__"][0]

    np.testing.assert_allclose(*outputs(None), atol=1e-6)
    assert np.abs(np.subtract(*outputs(keys))).max() > 0.1


def test_cell_by_cell_under_a_condition(random_variables):
    """With two streams, each of which is told of other cells of the map; one alone is what a run's samplers compare."""
    prior, codes = tiny_bottom(), jax.random.randint(jax.random.key(1), (2, 4, 6), 0, 6)
    prior = prior.clone(network=prior.network.clone(reading="causal"))
    upper = (jax.random.randint(jax.random.key(2), (2, 2, 3), 0, 6),)
    variables = random_variables(prior, codes, upper)
    condition = prior.apply(variables, upper, method="condition")
    found = cell_logits(prior, variables, codes, conditioning=condition)
    np.testing.assert_allclose(found, prior.apply(variables, codes, upper), atol=2e-5)


def test_the_class_moves_the_logits(random_variables):
    prior, codes = tiny_top(), jnp.zeros((2, 4, 4), int)
    variables = random_variables(prior, codes, label=jnp.zeros(2, int))
    logits = prior.apply(variables, codes, label=jnp.array([0, 2]))
    assert jnp.abs(logits[0] - logits[1]).min(-1).min() > 1e-4


def silent(params, name):
    """Parameters under which what has `name` in its path gives zero."""
    is_named = lambda path: name in jax.tree_util.keystr(path)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: 0.0 * leaf if is_named(path) else leaf, params)


def test_dropped_probabilities_see_nothing_and_dropped_logits_see_all_cells_alike(random_variables):
    """At a rate of nearly one, against attention that gives nothing and against attention without queries."""
    x, embedded = jax.random.normal(jax.random.key(0), (1, 3, 3, 4)), jax.random.normal(jax.random.key(1), (1, 3, 3, 5))
    attention = CausalAttention(2, 4, "elu", dropout=1.0 - 1e-6)
    variables = random_variables(attention, x, embedded)
    keys = Context(keys=rng.per_example(jax.random.key(3), jnp.arange(1)))
    call = lambda variables, **settings: attention.clone(**settings).apply(variables, x, embedded, keys)
    without = lambda name: call(silent(variables, name), dropout=0.0)
    np.testing.assert_allclose(call(variables, dropped="probabilities"), without("output']['aux']['kernel"), atol=1e-6)
    np.testing.assert_allclose(call(variables, dropped="logits"), without("query_projection"), atol=1e-6)
    assert np.abs(without("output']['aux']['kernel") - without("query_projection")).max() > 1e-2


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        ("attention']['output", {}),
        ("layer']['conv_out", {"attention_dropped": "logits"}),
        ("layer']['conv_out", {"attention_dropped": "probabilities"}),
        ("groups", {"output_layers": 1}),
        ("nothing", {"reading": "causal", "attention_every": 0}),
    ],
    ids=["layers", "logits of attention", "probabilities of attention", "output", "two stacks"],
)
def test_dropout_belongs_to_the_example_and_is_off_without_keys(random_variables, other, changes):
    settings = {"num_classes": 0, "layers": 1, "attention_every": 1, "output_layers": 0}
    prior = tiny_top(dropout=0.5, **settings | changes)
    codes = jnp.tile(jax.random.randint(jax.random.key(1), (1, 4, 4), 0, 6), (4, 1, 1))
    variables = silent(random_variables(prior, codes), other)
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
    assert captured["intermediates"]["network"]["groups"]["layer"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(full.apply)(variables, codes), atol=0.2)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (3, 5)),
        ({"reading": "causal", "attention_every": 0, "num_classes": 0, "manner": SCANNED}, (5, 3)),
        ({"manner": SCANNED, "layers": 3}, (1, 4)),
    ],
    ids=["attention", "causal", "scanned"],
)
def test_all_samplers_draw_the_same_codes(random_variables, changes, size):
    prior, ids, key = tiny_top(**changes), jnp.arange(4), jax.random.key(7)
    label = ids % 3 if prior.network.num_classes else None
    variables = random_variables(prior, jnp.zeros((1, *size), int), label=label if label is None else label[:1])
    noise, shape = sampling.gumbel_noise(key, ids, 6), (4, *size)
    logits = lambda codes, label: prior.apply(variables, codes, label=label)
    draw = lambda network: jax.jit(lambda: sampling.sample_codes(network, noise, shape))()
    expected = draw(sampling.whole(lambda codes: logits(codes, label)))
    np.testing.assert_array_equal(draw(incremental(prior, variables, label=label)), expected)
    codes, calls = sampling.sample_codes_predictively(logits, key, ids, label, (*size, 6))
    np.testing.assert_array_equal(codes, expected)
    assert calls.max() <= size[0] * size[1] and len(np.unique(expected)) > 2
