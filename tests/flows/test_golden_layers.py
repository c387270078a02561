"""Every golden layer of MaCow: outputs and log-determinants in float64 and float32, and exact round trips."""

import jax
import numpy as np
import pytest

from flows import actnorm, conv1x1, convert, coupling, layers, masked_conv, squeeze
from flows.layers import Shape

MASKED = [
    *(f"a_mcf_{order}" for order in "ABCD"),
    "a_mcf_A_cond",
    "a_mcf_D_cond",
    "a_mcf_B_additive",
    "a_mcf_C_additive",
]
COUPLINGS = [f"d_coupling_{kind}" for kind in ("f2", "f3", "f4", "f2_odd3", "f2_additive", "f2_cond")]


def masked_case(case):
    config, order = case.config, case.config["order"]
    params = convert.masked_conv(case.state, "", order)
    make = lambda inverse: masked_conv.masked_conv(
        order, config["in_channels"], tuple(config["kernel_size"]), config["scale"], config["s_channels"] or 0, inverse
    )
    return params, make("lines")


def shape_of(config, inverse="lines"):
    condition = config.get("s_channels", 0)
    hidden = config.get("hidden_channels", 0)
    return Shape("macow", tuple(config["kernel_size"]), hidden, config.get("scale", True), condition, inverse)


def case_of(macow, name, dtype):
    """Parameters and bijector of a golden file."""
    case = macow(name, dtype)
    channels, factor = case.config.get("in_channels"), case.config.get("factor", 2)
    hidden, affine = case.config.get("hidden_channels"), case.config.get("scale", True)
    if name.startswith("a_mcf"):
        return case, *masked_case(case)
    if name.startswith("d_coupling"):
        condition = case.config.get("s_channels") or 0
        return case, convert.coupling(case.state, ""), coupling.coupling(channels, hidden, factor, affine, condition)
    if name == "b_unit":
        return case, convert.unit(case.state, ""), layers.unit(channels, shape_of(case.config))
    if name.startswith("b_step"):
        return case, convert.step(case.state, ""), layers.step(channels, shape_of(case.config))
    if name == "d_actnorm":
        return case, convert.actnorm(case.state, ""), actnorm.actnorm(channels or 12)
    if name == "d_conv1x1":
        return case, {"matrix": case.state["weight"]}, conv1x1.conv1x1(channels or 12)
    return case, *glow_case(name, case, channels)


def glow_case(name, case, channels):
    hidden = case.config.get("hidden_channels")
    if name == "d_glowstep":
        return convert.glow_step(case.state, "", "coupling"), layers.prior(channels, hidden, 2, True)
    return convert.glow_step(case.state, "", "nice"), layers.prior(channels, hidden, 4, True)


LAYERS = [*MASKED, *COUPLINGS, "b_unit", "b_step", "b_step_cond", "d_actnorm", "d_conv1x1", "d_glowstep", "d_prior_f4"]


def check(case, params, bijector, dtype, rtol):
    condition = case.array("s", dtype) if "s" in case.arrays else None
    x = case.arrays["x"].astype(dtype).transpose(0, 2, 3, 1)
    y, log_det = jax.jit(bijector.forward_and_log_det)(params, x, condition)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, case.array("y", dtype), rtol=rtol, atol=0.1 * rtol)
    np.testing.assert_allclose(log_det, case.array("logdet", dtype), rtol=rtol, atol=0.1 * rtol)
    back, inverse_log_det = jax.jit(bijector.inverse_and_log_det)(params, y, condition)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-12 if dtype == np.float64 else 1e-5)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_float64(x64, macow, name):
    case, params, bijector = case_of(macow, name, np.float64)
    check(case, params, bijector, np.float64, 1e-9)
    assert not case.state.unused()


@pytest.mark.parametrize("name", ["a_mcf_D_cond", "d_coupling_f3", "b_step_cond", "d_prior_f4"])
def test_a_layer_in_float32(macow, name):
    case, params, bijector = case_of(macow, name, np.float32)
    check(case, params, bijector, np.float32, 1e-4)


def test_an_internal_level(x64, macow):
    case = macow("d_internal_block")
    shape = shape_of(case.config)
    parts = [
        layers.Part(layers.repeat(layers.step(12, shape), 1, False), layers.prior(12, 16, 4, True), 3),
        layers.Part(layers.repeat(layers.step(9, shape), 1, False), layers.prior(9, 16, 3, True), 3),
    ]
    bijector, params = layers.level(parts), convert.level(case.state, "", (1, 1))
    x = case.array("x")
    ((first, second), kept), log_det = jax.jit(bijector.forward_and_log_det)(params, x, None)
    y = np.concatenate([kept, second, first], -1)
    np.testing.assert_allclose(y, case.array("y"), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(log_det, case.array("logdet"), rtol=1e-9)
    back, _ = jax.jit(bijector.inverse_and_log_det)(params, ((first, second), kept), None)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-11)


def test_squeeze(macow):
    arrays = macow("d_squeeze").arrays
    x, y = (np.moveaxis(arrays[name], 1, -1) for name in ("x", "y"))
    np.testing.assert_array_equal(squeeze.squeeze(x), y)
    np.testing.assert_array_equal(squeeze.unsqueeze(y), x)
