"""Every bijector against numeric Jacobians and its own inverse; the orders of masked convolutions by perturbation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import causal
from flows import actnorm, conv1x1, convolution, coupling, encoder, layers, masked_conv, squeeze, transform
from flows.bijector import Bijector, repeat
from flows.config import FlowConfig
from flows.layers import Shape

MACOW = FlowConfig(((1,), (1, 1), (1,)), (4, 4, 4), prior_affine=False)
GLOW = FlowConfig(((2,), (1,)), (4, 4), kind="glow", factor=2)


def shape(kind="macow", condition_channels=0):
    return Shape(kind, (2, 3), 4, True, condition_channels, "lines")


def packed(config, scan=False, inverse="lines"):
    """A whole flow whose latents are one array."""
    flow = layers.multi_scale(config, 1, 0, scan, inverse)

    def forward(params, x, condition):
        latents, log_det = flow.forward_and_log_det(params, x, condition)
        return layers.pack(config, latents), log_det

    def inverted(params, y, condition):
        return flow.inverse_and_log_det(params, layers.unpack(config, y), condition)

    return Bijector(flow.init, forward, inverted, flow.init_from_batch)


# Name -> bijector, channels, channels of the condition.
CASES = {
    **{f"masked_{order}": (masked_conv.masked_conv(order, 2), 2, 0) for order in masked_conv.ORDERS},
    "masked_conditional": (masked_conv.masked_conv("D", 2, (3, 1), condition_channels=1), 2, 1),
    "masked_additive": (masked_conv.masked_conv("B", 2, (1, 5), affine=False), 2, 0),
    "actnorm": (actnorm.actnorm(2), 2, 0),
    "conv1x1": (conv1x1.conv1x1(2), 2, 0),
    "coupling": (coupling.coupling(3, 4), 3, 0),
    "coupling_conditional": (coupling.coupling(3, 4, 3, condition_channels=1), 3, 1),
    "step": (layers.step(2, shape(condition_channels=1)), 2, 1),
    "macow": (packed(MACOW), 1, 0),
    "glow": (packed(GLOW), 1, 0),
}


def perturbed(bijector, seed=0):
    """Parameters away from every special value, drawn without compiling the start."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        found = 0.3 * generator.standard_normal(leaf.shape)
        kind = path[-1].key
        found = np.eye(leaf.shape[-1]) + found if kind == "matrix" else 0.3 + np.abs(found) if kind == "gain" else found
        return jnp.asarray(found, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(bijector.init, jax.random.key(0)))


def batch(channels, condition_channels, size=2):
    """Images that are no squares: height is not taken for width."""
    x = jax.random.normal(jax.random.key(5), (size, 4, 8, channels), float)
    condition = jax.random.normal(jax.random.key(6), (size, 4, 8, condition_channels), float)
    return x, condition if condition_channels else None


@pytest.mark.parametrize("name", CASES)
def test_log_det_is_that_of_the_numeric_jacobian_and_the_inverse_undoes(x64, name):
    bijector, channels, condition_channels = CASES[name]
    params, (x, condition) = perturbed(bijector), batch(channels, condition_channels)
    # The first example, and it with each of its values moved down and up.
    step = 1e-5 * np.eye(x[0].size).reshape(-1, *x.shape[1:])
    many = jnp.concatenate([x, x[:1] - step, x[:1] + step])
    repeated = None if condition is None else jnp.concatenate([condition, jnp.repeat(condition[:1], 2 * len(step), 0)])
    y, log_det = jax.jit(bijector.forward_and_log_det)(params, many, repeated)
    assert log_det.shape == (len(many),) and y.dtype == np.float64
    down, up = y[2:].reshape(2, len(step), -1)
    np.testing.assert_allclose(log_det[0], np.linalg.slogdet((up - down) / 2e-5)[1], rtol=1e-7, atol=1e-6)
    back, inverse_log_det = jax.jit(bijector.inverse_and_log_det)(params, y, repeated)
    np.testing.assert_allclose(back, many, rtol=0, atol=1e-11 if name in ("macow", "glow") else 1e-12)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", masked_conv.ORDERS)
@pytest.mark.parametrize("kernel", [(2, 3), (1, 5)])
def test_a_pixel_depends_on_itself_and_on_the_lines_before_it(order, kernel):
    bijector = masked_conv.masked_conv(order, 1, kernel)
    params, (x, _) = perturbed(bijector), batch(1, 0, 1)
    flat = lambda v: bijector.forward_and_log_det(params, v.reshape(x.shape), None)[0].ravel()
    depends = np.asarray(jax.jit(jax.jacrev(flat))(x.ravel())) != 0.0
    lines, reach = kernel[0], kernel[1] // 2
    expected = np.zeros((32, 32), bool)
    for h, w, i, j in np.ndindex(4, 8, 4, 8):
        along, across = {"A": (h - i, w - j), "B": (i - h, w - j), "C": (w - j, h - i), "D": (j - w, h - i)}[order]
        expected[8 * h + w, 8 * i + j] = (h, w) == (i, j) or (1 <= along <= lines and abs(across) <= reach)
    np.testing.assert_array_equal(depends, expected)


@pytest.mark.parametrize("order", masked_conv.ORDERS)
def test_both_inverses_are_the_same_and_end_with_the_number_of_lines(order):
    by_lines, by_turns = (masked_conv.masked_conv(order, 2, inverse=inverse) for inverse in masked_conv.INVERSES)
    params, (y, _) = perturbed(by_lines), batch(2, 0)
    found = jax.jit(by_turns.inverse_and_log_det)(params, y, None)
    for ours, theirs in zip(found, jax.jit(by_lines.inverse_and_log_det)(params, y, None), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_fixed_point_stops_when_nothing_changes_and_heals_overflow():
    # Line i is 2 x the line before; wrong lines overflow on the way, and come right in their turn.
    turn = lambda x: jnp.concatenate([jnp.ones(1), 2.0 * x[:-1]])
    start = jnp.array([jnp.nan, jnp.inf, 0.0, 3e38])
    x, turns = masked_conv.fixed_point(turn, start, 4)
    np.testing.assert_array_equal(x, [1.0, 2.0, 4.0, 8.0])
    assert turns == 4
    assert masked_conv.fixed_point(turn, x, 4)[1] == 1
    assert masked_conv.fixed_point(lambda x: x + 1.0, jnp.zeros(2), 3)[1] == 3


def test_the_shifted_convolution_is_the_shared_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))
    expected = causal.shift_down(causal.causal_conv(x, kernel, 2))
    np.testing.assert_allclose(convolution.convolve(x, kernel, (2, 2)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [(2, 7), (7, 2)])
def test_a_convolution_as_a_matrix_product_has_the_gradients_of_a_convolution(channels, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, channels[0]))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, *channels))
    value = lambda x, kernel: jnp.sin(convolution.convolve(x, kernel, (1, 1))).sum()
    found = jax.value_and_grad(value, (0, 1))(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for ours, theirs in zip(*map(jax.tree.leaves, (found, jax.value_and_grad(value, (0, 1))(x, kernel))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convolve", [encoder.halving, encoder.doubling])
def test_strided_convolutions_are_those_of_jax(convolve):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    params = {"kernel": jax.random.normal(jax.random.key(1), (3, 3, 3, 5)), "bias": jnp.arange(5.0)}
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    if convolve is encoder.halving:
        expected = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), [(1, 1), (1, 1)], **options)
    else:
        padding = [(1, 2), (1, 2)]
        expected = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), padding, lhs_dilation=(2, 2), **options)
    np.testing.assert_allclose(convolve(params, x), expected + params["bias"], rtol=1e-5, atol=1e-5)


def test_squeezing_keeps_the_offset_of_a_pixel_together_with_its_channel():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = squeeze.squeeze(x)
    for dy, dx, c in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(y[..., (2 * dy + dx) * 3 + c], x[:, dy::2, dx::2, c])
    np.testing.assert_array_equal(squeeze.unsqueeze(y), x)


def test_a_scale_near_zero_has_a_finite_log_det():
    net = jnp.concatenate([jnp.zeros((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), -60.0)], -1)
    y, log_det = transform.forward(net, jnp.ones((1, 1, 1, 1)))
    np.testing.assert_allclose(log_det, -58.0, rtol=1e-6)
    np.testing.assert_allclose(transform.inverse(net, y)[0], 1.0, rtol=1e-5)


@pytest.fixture(scope="module")
def gradients():
    """Value and gradients of a loss of a whole flow, by how its like steps are computed."""
    x = jax.random.normal(jax.random.key(7), (3, 8, 8, 1))
    config = FlowConfig(((3,), (1,)), (4, 4), kind="glow", factor=2)
    params = perturbed(packed(config))

    def of(scan, memory):
        flow = packed(dataclasses.replace(config, memory=memory), scan)

        def loss(params, x):
            y, log_det = flow.forward_and_log_det(params, x, None)
            return (jnp.square(y).sum((1, 2, 3)) - log_det).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    return of


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    [
        (True, "reversible"),
        (False, "remat"),
        pytest.param((True, "plain"), marks=SLOW),
        pytest.param((True, "remat"), marks=SLOW),
    ],
)
def test_gradients_are_the_same_however_steps_are_computed(gradients, how):
    for found, expected in zip(*(jax.tree.leaves(gradients(*case)) for case in (how, (False, "plain"))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_reversible_gradient_reaches_the_condition():
    one = layers.step(2, shape(kind="glow", condition_channels=1))
    params, (x, condition) = perturbed(repeat(one, 2, True)), batch(2, 1)

    def loss(condition, memory):
        y, log_det = repeat(one, 2, True, memory).forward_and_log_det(params, x, condition)
        return jnp.square(y).sum() - log_det.sum()

    found, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(condition, memory) for memory in ("reversible", "plain")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_data_dependent_start_standardises_what_leaves_actnorm_and_the_convolutions():
    one = layers.unit(3, shape())
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (16, 4, 4, 3))
    params, y = jax.jit(one.init_from_batch)(one.init(jax.random.key(1)), x, None)
    h, _ = actnorm.forward_and_log_det(params["actnorm1"], x)
    np.testing.assert_allclose(h.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(h.std((0, 1, 2), ddof=1), 1.0, rtol=1e-4)
    seen = causal.shift_down(causal.causal_conv(h, convolution.effective(params["A"]["conv"])["kernel"], 1))
    seen = seen + params["A"]["conv"]["bias"]
    np.testing.assert_allclose(seen.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(seen.std((0, 1, 2), ddof=1), 1.0, rtol=1e-3)
    # Nets end in zeros: what is left are actnorms and four times sigmoid(2).
    after, _ = actnorm.forward_and_log_det(params["actnorm2"], jax.nn.sigmoid(2.0) ** 2 * h)
    np.testing.assert_allclose(y, jax.nn.sigmoid(2.0) ** 2 * after, rtol=1e-4, atol=1e-5)
