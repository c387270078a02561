"""Forecasting modules: what they may see, what they learn, and that one pixel is computed as the whole image is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import modules
from arm_forecast.config import ModulesConfig
from arm_forecast.pixelcnn import Grid
from bitsperdim.errors import InputError

GRID = Grid(4, 4, 3, 4)
FEATURES = 6


@pytest.fixture
def case():
    config = ModulesConfig(modules=2, filters=6, inputs=("x", "noise"))
    params = modules.init(jax.random.key(0), config, FEATURES, GRID)
    h = jax.random.normal(jax.random.key(1), (2, 4, 4, FEATURES))
    x = jax.random.randint(jax.random.key(2), (2, 4, 4, 3), 0, 4)
    noise = jax.random.normal(jax.random.key(3), (2, 4, 4, 3, 4))
    return config, params, h, modules.module_inputs(config, x, noise, 4)


def test_the_forecast_of_the_independent_network_and_its_loss(categorical, to_nhwc):
    arrays = categorical.arrays
    kernel = arrays["p/fc.c1.w"].transpose(2, 3, 1, 0)
    out = arrays["p/fc.c2.w"][:, :, 0, 0].T
    params = {"h": kernel[None], "bias": arrays["p/fc.c1.b"][None], "out": out[None]}
    params["out_bias"] = arrays["p/fc.c2.b"][None]
    h = jnp.asarray(to_nhwc(arrays["h"]))
    found = modules.whole(params, categorical.grid, h, {})
    expected = to_nhwc(arrays["fc_logits"]).reshape(2, 8, 8, 1, 3, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    arm = to_nhwc(arrays["logits"]).reshape(2, 8, 8, 3, 4)
    kl = modules.divergence(jnp.asarray(arm), found)
    np.testing.assert_allclose(kl, arrays["kl"].sum((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(arrays["nll"].sum() + 0.01 * kl.sum(), arrays["loss_total"], rtol=1e-6)


@pytest.mark.parametrize("output", ["h", "x"])
def test_a_forecast_depends_on_what_comes_strictly_before_its_dimension(case, output):
    """By the Jacobian, in the order rows, columns, channels; group g of h belongs to channel g of its pixel."""
    _, params, h, inputs = case
    maps = {"h": h[:1], **{name: value[:1] for name, value in inputs.items()}}
    forecast = lambda value: modules.whole(params, GRID, *_split(maps | {output: value}))[0].reshape(16, 2, 3, 4)
    jacobian = np.abs(jax.jacobian(forecast)(maps[output]))[:, :, :, :, 0]  # [pixel t c k, h w f]
    width = maps[output].shape[-1] // 3
    seen = jacobian.max((1, 3)).reshape(48, 16, 3, width).max(-1).reshape(48, 48)
    assert (seen[np.triu_indices(48)] == 0).all()
    # Within reach of three rows and columns everything before is seen: left neighbours, channels before, and above.
    assert seen[5 * 3 + 2, 5 * 3 + 1] > 0 and seen[5 * 3, 4 * 3 + 2] > 0 and seen[5 * 3, 2 * 3] > 0


def _split(maps):
    return maps["h"], {name: value for name, value in maps.items() if name != "h"}


def test_all_noise_is_seen(case):
    """It is known before sampling begins, also that of dimensions to come."""
    _, params, h, inputs = case
    forecast = lambda noise: modules.whole(params, GRID, h, inputs | {"noise": noise})[0, 1, 1].sum()
    gradient = np.abs(jax.grad(forecast)(inputs["noise"]))[0].max(-1)
    assert (gradient[:3, :3] > 0).all() and (gradient[3] == 0).all()


def test_one_pixel_is_computed_as_in_the_whole_image(case):
    _, params, h, inputs = case
    expected = modules.whole(params, GRID, h, inputs)
    padded = {name: np.pad(v, ((0, 0), (1, 1), (1, 1), (0, 0))) for name, v in {"h": h, **inputs}.items()}
    for i, j in ((0, 0), (1, 2), (3, 3)):
        patches = {name: jnp.asarray(v[:, i : i + 3, j : j + 3]) for name, v in padded.items()}
        np.testing.assert_allclose(modules.at_pixel(params, GRID, patches), expected[:, i, j], atol=1e-5)


def test_the_divergence_compares_each_module_with_the_pixel_it_looks_ahead_to():
    """In loops, in double precision."""
    arm = jax.random.normal(jax.random.key(0), (2, 2, 3, 1, 5))
    forecast = jax.random.normal(jax.random.key(1), (2, 2, 3, 4, 1, 5))
    p = np.asarray(jax.nn.softmax(arm), np.float64).reshape(2, 6, 5)
    q = np.asarray(jax.nn.softmax(forecast), np.float64).reshape(2, 6, 4, 5)
    total = np.zeros(2)
    for anchor in range(6):
        for t in range(4):
            if anchor + t < 6:
                target = p[:, anchor + t]
                total += (target * np.log(target / q[:, anchor, t])).sum(-1)
    np.testing.assert_allclose(modules.divergence(arm, forecast), total, rtol=1e-5)


def test_no_gradient_reaches_the_distribution_of_the_arm():
    arm, forecast = (jax.random.normal(jax.random.key(seed), (1, 2, 2, 1, 3)) for seed in (0, 1))
    to_arm = jax.grad(lambda a: modules.divergence(a, forecast[:, :, :, None]).sum())(arm)
    to_forecast = jax.grad(lambda f: modules.divergence(arm, f[:, :, :, None]).sum())(forecast)
    np.testing.assert_array_equal(to_arm, 0.0)
    np.testing.assert_allclose(to_forecast, jax.nn.softmax(forecast) - jax.nn.softmax(arm), atol=1e-6)


def test_kernels_start_uniform_within_the_root_of_the_fan_in():
    config = ModulesConfig(modules=3, filters=30, inputs=("x", "noise"))
    params = modules.init(jax.random.key(0), config, 24, Grid(8, 8, 3, 16))
    outputs = 3 * 16
    seen = 9 * (24 + 2 * outputs)
    for name, fan_in in [("h", seen), ("x", seen), ("noise", seen), ("bias", seen), ("out", 30), ("out_bias", 30)]:
        assert np.abs(params[name]).max() <= fan_in**-0.5
        np.testing.assert_allclose(params[name].std(), (3 * fan_in) ** -0.5, rtol=0.1)


def test_unknown_pixels_are_zeros_among_the_inputs():
    config = ModulesConfig(inputs=("x",), filters=3)
    maps = modules.module_inputs(config, jnp.array([[[[0, -1]]]]), None, 3)
    np.testing.assert_array_equal(maps["x"][0, 0, 0], [1, 0, 0, 0, 0, 0])


def test_filters_that_do_not_split_into_the_channels_are_refused():
    with pytest.raises(InputError, match=r"modules\.model\.filters=5 is not divisible by the 3 channels"):
        modules.check(ModulesConfig(filters=5), GRID, "modules.model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules": -1}, "modules must be at least 0, not -1"),
        ({"filters": 0}, "filters must be at least 1, not 0"),
        ({"weight": -0.1}, r"weight must be at least 0, not -0\.1"),
        ({"inputs": ("h",)}, "inputs must be some of"),
        ({"inputs": ("x", "x")}, "inputs must be some of"),
        ({"posterior": "right"}, "posterior must be one of exact, literal, not 'right'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ModulesConfig(**values)
