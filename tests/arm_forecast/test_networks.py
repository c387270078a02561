"""PixelCNN under the sampling engine: the recorded samples and calls, windows, and modules at one pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import ancestral, engine, forecasters, modules, networks
from arm_forecast.config import ModulesConfig
from arm_forecast.forecasters import Call
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim.errors import InputError
from tests.arm_forecast import toys


@pytest.fixture(scope="module")
def case(categorical, to_nhwc):
    """The categorical network with its forecasting head, and a source of its recorded noise."""
    arrays = categorical.arrays
    head = {"h": arrays["p/fc.c1.w"].transpose(2, 3, 1, 0)[None], "bias": arrays["p/fc.c1.b"][None]}
    head |= {"out": arrays["p/fc.c2.w"][:, :, 0, 0].T[None], "out_bias": arrays["p/fc.c2.b"][None]}
    params = {"arm": categorical.params, "modules": head}
    params = networks.prepared(jax.tree.map(jnp.asarray, params), categorical.config, categorical.grid)
    eps = jnp.asarray(arrays["eps"].transpose(0, 3, 4, 1, 2).reshape(2, 192, 4))

    def noise(key):
        return lambda ids, dims, call=None: eps[ids[:, None], jnp.broadcast_to(dims, (len(ids), dims.shape[-1]))]

    return categorical, params, noise


def head_logits(grid):
    """The forecast logits of every dimension, from the h of whole images."""

    def logits(params, call):
        found = modules.whole(params["modules"], grid, call.hidden.rows[:, 1:], {})
        return found.reshape(len(found), -1, grid.values)

    return logits


@pytest.mark.parametrize("mode", ["zeros", "last", "fpi", "fc3"])
def test_the_recorded_samples_calls_and_accepted_dimensions(case, to_nhwc, mode):
    network, params, noise = case
    forecaster = {
        "zeros": forecasters.zeros,
        "last": forecasters.last,
        "fpi": forecasters.fixed_point,
        "fc3": lambda: toys.next_dims(head_logits(network.grid), 3, with_noise=True),
    }[mode]()
    draw = engine.sampler(networks.whole(network.config, network.grid), forecaster, 2, 2, noise=noise)
    samples = draw(params, jax.random.key(0))
    np.testing.assert_array_equal(samples.x, to_nhwc(network.arrays["x_ancestral"]).reshape(2, -1))
    np.testing.assert_array_equal(samples.calls, network.arrays[f"calls_{mode}"])
    for found, recorded, calls in zip(
        engine.trace(samples.call_of), network.arrays[f"accepted_{mode}"], samples.calls, strict=True
    ):
        # The file repeats 192 behind a sample's last call, where a trace has -1.
        np.testing.assert_array_equal(found[:calls], recorded[:calls])
    np.testing.assert_allclose(samples.margin, network.arrays["argmax_margin"], atol=1e-4)


@pytest.mark.parametrize("kind", ["fixed_point", "modules"])
def test_windows_draw_what_whole_images_draw(case, to_nhwc, kind):
    network, params, noise = case
    predict = networks.predictor(ModulesConfig(modules=1, filters=12), network.grid)
    forecaster = forecasters.fixed_point() if kind == "fixed_point" else forecasters.modules(predict, 1, (8, 8, 3))
    windowed = networks.windowed(network.config, network.grid, 4)
    samples = engine.sampler(windowed, forecaster, 2, 2, noise=noise)(params, jax.random.key(0))
    np.testing.assert_array_equal(samples.x, to_nhwc(network.arrays["x_ancestral"]).reshape(2, -1))


def test_a_window_shows_the_modules_its_rows_and_the_one_above(case, to_nhwc):
    network, params, _ = case
    h = np.pad(to_nhwc(network.arrays["h"]), ((0, 0), (1, 0), (0, 0), (0, 0)))  # zeros above the image
    windowed = networks.windowed(network.config, network.grid, 4)
    x, call = jnp.asarray(network.x, jnp.int32).reshape(2, -1), jax.jit(windowed.call)
    _, first, pending = call(params, windowed.init(2), x, jnp.array([0, 0]), ())
    _, second, _ = call(params, windowed.advance(pending, jnp.array([1, 0])), x, jnp.array([96, 0]), ())
    np.testing.assert_array_equal([first.first, second.first], [[-1, -1], [3, -1]])
    np.testing.assert_allclose(first.rows, h[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second.rows, [h[0, 4:], h[1, :5]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [(), ("x", "noise")])
def test_the_modules_see_at_one_pixel_what_they_see_in_whole_images(case, inputs):
    """With the row above the pixel in the window or cached; what is not accepted yet is no value of x."""
    network, _, _ = case
    grid, config = network.grid, ModulesConfig(modules=2, filters=12, inputs=inputs)
    learned = modules.init(jax.random.key(1), config, 12, grid)
    x = jnp.asarray(network.x, jnp.int32)
    noise = jax.random.normal(jax.random.key(2), (2, 8, 8, 3, 4))
    h = jax.random.normal(jax.random.key(3), (2, 8, 8, 12))
    pixel = jnp.array([8 * 4 + 0, 8 * 6 + 7])
    frontier = pixel * 3 + jnp.array([0, 1])
    known = jnp.where(jnp.arange(192) < frontier[:, None], x.reshape(2, -1), -1).reshape(x.shape)
    expected = modules.whole(learned, grid, h, modules.module_inputs(config, known, noise, 4))
    # The window of four rows from row 4, with the row above it.
    hidden = networks.Hidden(h[:, 3:], jnp.array([3, 3]))
    flat = noise.reshape(2, 192, 4)
    call = Call(
        ids=jnp.arange(2),
        inputs=x.reshape(2, -1),
        outputs=x.reshape(2, -1),
        accepted=jnp.zeros((2, 192), bool),
        frontier=frontier,
        start=jnp.array([96, 96]),
        logits=jnp.zeros((2, 96, 4)),
        hidden=hidden,
        noise=lambda dims: jnp.take_along_axis(flat, dims[..., None], 1),
        draw=None,
    )
    found = networks.predictor(config, grid)({"modules": learned}, call, pixel)
    for lane, (row, column) in enumerate([(4, 0), (6, 7)]):
        np.testing.assert_allclose(found[lane], expected[lane, row, column], atol=1e-5)


def test_one_evaluation_of_a_mixture_serves_all_channels_of_a_pixel(random_params):
    config, grid = NetworkConfig(resnets=1, filters=6, output="dmol", mixtures=2), Grid(4, 4, 3, 4)
    params = networks.prepared({"arm": random_params(config, grid)}, config, grid)
    given = np.full(48, -1)
    given[:9] = 1
    known = {"given": given, "temperature": 0.7}
    cached = ancestral.sampler(config, grid, 2, top_p=0.8)(params, jax.random.key(0), **known)
    whole = engine.sampler(networks.whole(config, grid), forecasters.fixed_point(), 2, 2, top_p=0.8)
    whole = whole(params, jax.random.key(0), **known)
    np.testing.assert_array_equal(cached.x, whole.x)
    np.testing.assert_array_equal(cached.calls, [13, 13])
    np.testing.assert_array_equal(cached.call_of[0], np.maximum(np.arange(48) // 3 - 2, 0))
    assert cached.network_calls == 16
    np.testing.assert_allclose(cached.margin, whole.margin, atol=1e-4)
    np.testing.assert_allclose(cached.log_prob, whole.log_prob, rtol=1e-5)


@pytest.mark.parametrize("given", [np.zeros(47, int), np.full(48, 4), np.zeros(48)])
def test_cached_sampling_refuses_what_cannot_be_given(given):
    draw = ancestral.sampler(NetworkConfig(resnets=1, filters=6), Grid(4, 4, 3, 4), 2)
    with pytest.raises(InputError, match="given must"):
        draw({}, jax.random.key(0), given=given)
