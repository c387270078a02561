"""The network against the published one and an independent one, and who may know what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import convert, layers, pixelcnn
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import distributions, rng
from bitsperdim.errors import InputError


class Recording(layers.Whole):
    """Keeps the value of every gated layer and every change of resolution."""

    def __init__(self, weights):
        super().__init__(weights)
        self.values = {}

    def gated(self, name, x, skip=None):
        self.values[name] = super().gated(name, x, skip)
        return self.values[name]

    def below(self, name, x, inner):
        def recorded(executor, z):
            self.values[f"downsize{name}"] = z
            return inner(executor, z)

        self.values[f"upsize{name}"], extra = super().below(name, x, recorded)
        return self.values[f"upsize{name}"], extra


@functools.partial(jax.jit, static_argnums=(1, 2))
def hidden(params, config, grid, x, keys=None):
    return pixelcnn.hidden(params, config, grid, x, keys)


@functools.partial(jax.jit, static_argnums=(1, 2))
def logits(params, config, grid, x):
    return pixelcnn.logits(params, config, grid, pixelcnn.hidden(params, config, grid, x))


def random_image(grid):
    return np.asarray(jax.random.randint(jax.random.key(1), (2, *grid[:3]), 0, grid.values))


def test_categorical_network_equals_the_independent_one(categorical, to_nhwc):
    h = hidden(categorical.params, categorical.config, categorical.grid, categorical.x)
    np.testing.assert_allclose(h, to_nhwc(categorical.arrays["h"]), rtol=1e-4, atol=1e-4)
    out = pixelcnn.logits(categorical.params, categorical.config, categorical.grid, h)
    expected = to_nhwc(categorical.arrays["logits"]).reshape(out.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    nll = -distributions.categorical_log_prob(out, categorical.x).sum((1, 2, 3))
    np.testing.assert_allclose(nll, categorical.arrays["nll"], rtol=1e-6)


def test_masks_are_those_of_the_independent_network(categorical):
    table = pixelcnn.table(categorical.config, categorical.grid)
    assert set(table) == set(categorical.arrays["masks"])
    for name, layer in table.items():
        ones = jnp.ones((*layer.kernel, layer.inputs, layer.outputs))
        expected = categorical.arrays["masks"][name]
        np.testing.assert_array_equal(layers.masked(ones, layer.mask), ones if expected is None else expected, name)


def test_categorical_network_depends_on_what_the_independent_one_does(categorical, dependencies):
    config, grid = categorical.config, categorical.grid
    f = lambda x: logits(categorical.params, config, grid, x).reshape(len(x), -1)
    found = dependencies(f, categorical.x[0], grid.values).reshape(192, 4, 192).any(1)
    expected = np.unpackbits(categorical.arrays["dep_logits"], axis=1).astype(bool)
    np.testing.assert_array_equal(found, expected)


def test_mixture_network_equals_the_published_one_at_every_block(mixture, to_nhwc):
    config, grid = mixture.config, mixture.grid

    @jax.jit
    def record(params, x):
        weights = pixelcnn.prepare(params, config, grid)
        executor = Recording(weights)
        padding = ((0, 0), (2, 0), (1, 1), (0, 0))
        e = pixelcnn.encode(config, grid, jnp.pad(x.astype(int), padding, constant_values=layers.OUTSIDE))
        u = layers.u_stem(weights, e)
        pixelcnn.ul_stream(executor, layers.ul_stem(weights, e), pixelcnn.u_stream(executor, config, u))
        return executor.values | {"u_init": u}

    values = record(mixture.params, mixture.x)
    found = {"u_init": values["u_init"]}
    for stream in ("u", "ul"):
        for level in range(3):
            found[f"up{level}/{stream}"] = values[f"up{level}/{stream}0"]
            found[f"down{2 - level}/{stream}"] = values[f"down{level}/{stream}{int(level < 2)}"]
        for level in range(2):
            found[f"downsize_{stream}_stream{level}"] = values[f"downsize{level}/{stream}"]
            found[f"upsize_{stream}_stream{1 - level}"] = values[f"upsize{level}/{stream}"]
    for name, value in found.items():
        np.testing.assert_allclose(value, to_nhwc(mixture.arrays[f"act/{name}"]), rtol=1e-4, atol=1e-4, err_msg=name)
    out = logits(mixture.params, config, grid, mixture.x)
    np.testing.assert_allclose(out, to_nhwc(mixture.arrays["logits"]), rtol=1e-4, atol=1e-4)


def test_mixture_network_depends_on_the_pixels_the_published_one_does(mixture, dependencies):
    f = lambda x: logits(mixture.params, mixture.config, mixture.grid, x).reshape(len(x), -1)
    found = dependencies(f, mixture.x[0].astype(int), 256).reshape(64, 50, 64, 3).any((1, 3))
    np.testing.assert_array_equal(found, mixture.arrays["dep"])


def test_gradients_of_the_likelihood_are_the_published_ones(mixture):
    def loss(params):
        out = logits(params, mixture.config, mixture.grid, mixture.x)
        return -distributions.discretized_logistic_mixture_log_prob(out, mixture.x, 256).sum()

    quickly = {"xla_backend_optimization_level": 0}  # compiles in half the time
    value, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=quickly)(mixture.params)
    np.testing.assert_allclose(value, mixture.arrays["loss_nats_sum"], rtol=1e-6)
    named = {name[5:]: array for name, array in mixture.arrays.items() if name.startswith("grad/")}
    expected = convert.params_from_torch(named, weight_norm=True)  # linear, so it converts gradients too
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), name


def test_fixed_point_iteration_walks_through_the_published_iterates(mixture, to_nhwc):
    """Each iterate is sampled, with the same uniforms, from the network's outputs at the one before."""
    trace = [to_nhwc(iterate) for iterate in mixture.arrays["fpi_trace_int"]]
    for before, after in itertools.pairwise(trace):
        out = logits(mixture.params, mixture.config, mixture.grid, before)
        uniforms = mixture.arrays["u_mix"], mixture.arrays["u_log"]
        values = distributions.sample_discretized_logistic_mixture(out, *uniforms, 256)
        np.testing.assert_array_equal(distributions.value_to_level(values, 256), after)
    np.testing.assert_array_equal(trace[-1], to_nhwc(mixture.arrays["ancestral_int"]))


@pytest.mark.parametrize(
    "output, channels, filters",
    [
        ("categorical", 1, 6),
        ("categorical", 3, 12),
        ("categorical", 4, 12),
        ("dmol", 3, 8),
        ("dmol", 1, 8),
    ],
)
def test_an_output_sees_what_comes_before_it_and_nothing_else(output, channels, filters, dependencies, random_params):
    """Dimensions are ordered by row, column, channel; mixture parameters see whole pixels before their own."""
    config, grid = NetworkConfig(resnets=1, filters=filters, output=output, mixtures=2), Grid(8, 8, channels, 4)
    params = random_params(config, grid)
    f = lambda x: logits(params, config, grid, x).reshape(len(x), -1)
    seen = dependencies(f, random_image(grid)[0], grid.values)
    dims = 64 * channels
    if output == "categorical":
        seen = seen.reshape(dims, grid.values, dims).any(1)
    else:
        seen = seen.reshape(64, -1, 64, channels).any((1, 3))
    assert not np.triu(seen).any()
    allowed = np.tri(len(seen), k=-1, dtype=bool)
    assert seen[allowed].mean() > 0.97
    # Every output sees the one before it, unless that ends the row above: shallow networks do not reach so far.
    blind = 1 + np.flatnonzero(~np.diag(seen, -1))
    assert not (blind % (len(seen) // grid.height)).any()


def test_groups_of_h_know_only_the_channels_before_them(categorical, dependencies):
    """Group g of h sees the channels before g of its own pixel: the last channel is in none."""
    config, grid = categorical.config, categorical.grid
    f = lambda x: hidden(categorical.params, config, grid, x).reshape(len(x), -1)
    seen = dependencies(f, categorical.x[0], grid.values).reshape(64, 3, 4, 64, 3).any(2)
    own = np.stack([seen[i, :, i] for i in range(64)]).any(0)
    np.testing.assert_array_equal(own, np.tri(3, k=-1, dtype=bool))


def test_weight_normalisation_starts_at_the_plain_kernels():
    table = {"up0/u0": layers.Layer((2, 3), 4, 5, 0), "head": layers.Layer((1, 1), 5, 2, 0)}
    plain, normed = (layers.init(jax.random.key(0), table, weight_norm) for weight_norm in (False, True))
    for name in table:
        expected, found = layers.lookup(plain, name), layers.lookup(normed, name)
        np.testing.assert_allclose(layers.effective_kernel(found), expected["kernel"], rtol=1e-5)
        np.testing.assert_array_equal(found["bias"], expected["bias"])


def test_gains_scale_the_outputs_and_the_length_of_v_does_nothing():
    v, g = np.asarray(jax.random.normal(jax.random.key(0), (2, 2, 3, 2))), np.array([3.0, 0.5])
    expected = g * v / np.sqrt((v**2).sum((0, 1, 2)))
    np.testing.assert_allclose(layers.effective_kernel({"v": 7 * v, "g": g}), expected, rtol=1e-5)


def test_kernels_start_uniform_within_the_root_of_the_fan_in():
    table = {"up0/u0": layers.Layer((2, 3), 24, 30, 0), "head": layers.Layer((1, 1), 50, 60, 0)}
    params = layers.init(jax.random.key(0), table, weight_norm=False)
    for leaf, fan_in in [(params["up0"]["u0"], 2 * 3 * 24), (params["head"], 50)]:
        for array in leaf.values():
            assert np.abs(array).max() <= fan_in**-0.5
        np.testing.assert_allclose(leaf["kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.05)
        np.testing.assert_allclose(leaf["kernel"].mean(), 0.0, atol=0.1 * fan_in**-0.5)


def test_dropout_of_an_example_does_not_depend_on_its_place_in_the_batch(categorical):
    config, grid = categorical.config, categorical.grid
    x = np.repeat(categorical.x[:1], 2, 0)
    keys = rng.per_example(jax.random.key(5), jnp.arange(2))
    h = hidden(categorical.params, config, grid, x, keys)
    np.testing.assert_allclose(hidden(categorical.params, config, grid, x, keys[::-1]), h[::-1], rtol=1e-4, atol=1e-4)
    assert np.abs(h[0] - h[1]).max() > 0.01
    assert np.abs(h[0] - hidden(categorical.params, config, grid, x)[0]).max() > 0.01


@pytest.mark.parametrize("whole_channels", [True, False])
def test_dropout_drops_half_of_the_channels_or_of_the_elements(whole_channels):
    keys = rng.per_example(jax.random.key(5), jnp.arange(64))
    kept = np.asarray(layers.Dropout(keys, 0.5, whole_channels)("layer", jnp.ones((64, 3, 3, 32))))
    assert set(np.unique(kept)) == {0.0, 2.0}
    np.testing.assert_allclose(kept.mean(), 1.0, atol=0.1)
    uniform = (kept == kept[:, :1, :1]).all((1, 2)).mean()
    assert uniform == 1.0 if whole_channels else uniform < 0.05
    assert (layers.Dropout(keys, 0.5, whole_channels)("other", jnp.ones((64, 3, 3, 32))) != kept).mean() > 0.3


def test_what_is_dropped_lies_between_the_two_convolutions_of_a_gated_layer():
    """Where everything is dropped, x + p sigmoid(q) with the biases p, q of the second convolution is left."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    first, second = ({"kernel": draw(n, 2, 2, 6, 3 * n), "bias": draw(n + 2, 3 * n)} for n in (1, 2))
    weights = layers.Weights({"up0/ul0/conv_in": first, "up0/ul0/conv_out": second})
    x = draw(5, 1, 2, 2, 3)
    found = layers.Whole(weights, lambda name, y: 0.0 * y).gated("up0/ul0", x, draw(6, 1, 2, 2, 3))
    p, q = second["bias"][:3], second["bias"][3:]
    np.testing.assert_allclose(found, x + p / (1 + np.exp(-q)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["channel", "element"])
def test_rate_and_kind_of_dropout_are_the_configs(categorical, monkeypatch, kind):
    used = []
    monkeypatch.setattr(layers, "Dropout", lambda *given: used.append(given) or (lambda name, y: y))
    config = NetworkConfig(resnets=1, filters=12, dropout=0.3, dropout_kind=kind)
    keys = rng.per_example(jax.random.key(5), jnp.arange(2))
    jax.eval_shape(lambda: pixelcnn.hidden(categorical.params, config, categorical.grid, categorical.x, keys))
    assert used == [(keys, 0.3, kind == "channel")]


def test_bfloat16_keeps_logits_in_float32_and_near(categorical):
    grid, x = categorical.grid, categorical.x
    low = NetworkConfig(resnets=1, filters=12, dtype="bfloat16")
    shape = jax.eval_shape(lambda: pixelcnn.hidden(categorical.params, low, grid, x))
    assert shape.dtype == jnp.bfloat16
    rough = logits(categorical.params, low, grid, x)
    exact = logits(categorical.params, categorical.config, grid, x)
    assert rough.dtype == jnp.float32
    assert np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


def test_prepared_weights_give_the_same_bits(categorical):
    config, grid, x = categorical.config, categorical.grid, categorical.x
    weights = pixelcnn.prepare(categorical.params, config, grid)
    assert pixelcnn.prepare(weights, config, grid) is weights
    np.testing.assert_array_equal(logits(weights, config, grid, x), logits(categorical.params, config, grid, x))


@pytest.mark.parametrize(
    "config, grid, message",
    [
        (NetworkConfig(filters=160), Grid(8, 8, 3, 4), "filters=160 must be a multiple of the images' 3 channels"),
        (NetworkConfig(), Grid(8, 10, 3, 4), "halves 8x10 pixels or codes twice, .* multiples of 4"),
        (NetworkConfig(output="dmol"), Grid(8, 8, 4, 4), "1 or 3 channels, not 4"),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_refused(config, grid, message):
    with pytest.raises(InputError, match=message):
        pixelcnn.init(jax.random.key(0), config, grid)


@pytest.mark.parametrize(
    "key, value", [("filters", 0), ("dropout", 1.0), ("dropout_kind", "both"), ("output", "gaussian"), ("dtype", "f8")]
)
def test_a_config_names_the_value_that_it_refuses(key, value):
    with pytest.raises(ValueError, match=f"^{key} must .*not '?{value}"):
        NetworkConfig(**{key: value})
