"""Whole golden flows: latents, likelihoods, gradients, samples; learned noise; data-dependent starts; Adam."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitsperdim import dequantize, likelihood, optim
from bitsperdim.optim import OptimConfig
from flows import actnorm, bounds, convert, convolution, dequantization, encoder, layers
from flows.config import FlowConfig
from flows.layers import Shape

FLOWS = ["c_flow_16_L2_5bit_additive", "c_flow_16_L3_ddi"]
STRESS = pytest.param("c_flow_16_L3", marks=pytest.mark.slow)


def flow_of(config, condition_channels=0):
    return layers.multi_scale(config, 3, condition_channels, False, "lines")


def input_of(case, dtype):
    """z of `pixels` and `u`: in float64 the stored x is rounded."""
    bits = case.config["n_bits"]
    levels = case.array("pixels", np.uint8) >> (8 - bits)
    return dequantize.scale(levels + case.array("u", dtype).astype(dtype), 2**bits, "symmetric"), 2**bits


def log_prob(flow, params, z):
    latents, log_det = flow.forward_and_log_det(params, z, None)
    return sum(map(dequantization.log_normal, latents), start=log_det), (latents, log_det)


@pytest.fixture(scope="module", params=[*FLOWS, STRESS])
def whole(request, macow):
    """Case, config, params and compiled functions of a flow, in float64."""
    with jax.enable_x64(True):
        case = macow(request.param)
        config = convert.flow_config(case.state, "flow.")
        params = convert.flow(case.state, "flow.", config)
        assert not case.state.unused()
        flow = flow_of(config)
        forward = jax.jit(lambda params, z: log_prob(flow, params, z))
        yield case, config, params, forward, jax.jit(flow.inverse_and_log_det)


def test_latents_and_likelihood(x64, whole):
    case, config, params, forward, inverse = whole
    z, levels = input_of(case, np.float64)
    nats, (latents, log_det) = forward(params, z)
    np.testing.assert_allclose(layers.pack(config, latents), case.array("z"), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det, case.array("logdet"), rtol=1e-9)
    np.testing.assert_allclose(nats, case.array("logprob"), rtol=1e-9)
    bits = likelihood.bits_per_dim(-nats - dequantize.log_jacobian(768, levels, "symmetric"), 768)
    np.testing.assert_allclose(bits, case.array("bits_per_dim"), rtol=1e-9)
    back, inverse_log_det = inverse(params, latents, None)
    np.testing.assert_allclose(back, z, rtol=0, atol=1e-11)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-9)
    for packed, latent in zip(layers.unpack(config, layers.pack(config, latents)), latents, strict=True):
        np.testing.assert_array_equal(packed, latent)


def test_samples(x64, whole):
    case, config, params, _, inverse = whole
    if "sample_z" not in case.arrays:
        pytest.skip("sampling overflows with the parameters of this stress test")
    bits = case.config["n_bits"]
    for temperature in ("0.7", "1.0"):
        latents = layers.unpack(config, float(temperature) * case.array("sample_z"))
        x, _ = inverse(params, latents, None)
        np.testing.assert_allclose(x, case.array(f"sample_x_t{temperature}"), rtol=1e-6, atol=1e-5)
        pixels = dequantize.to_levels(dequantize.unscale(x, 2**bits, "symmetric"), 2**bits) << (8 - bits)
        # The reference clips to 255 after it has spread the levels, which reaches beyond the last one.
        expected = np.minimum(case.array(f"sample_pixels_t{temperature}", np.uint8), (2**bits - 1) << (8 - bits))
        assert (pixels == expected).mean() > 0.999


@pytest.mark.slow
def test_gradients(x64, whole):
    """With our parameters as functions of theirs, of which the gradients are known."""
    case, config, params, _, _ = whole
    z, _ = input_of(case, np.float64)
    loss = lambda params, z: -log_prob(flow_of(config), params, z)[0].mean()
    value, (of_params, of_z) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, z)
    np.testing.assert_allclose(value, case.arrays["train_loss_f64"], rtol=1e-9)
    scale = np.abs(case.array("grad_x")).max()
    np.testing.assert_allclose(of_z, case.array("grad_x"), rtol=1e-5, atol=1e-6 * scale)
    check_norms(case, config, of_params)


def check_norms(case, config, of_params, prefix="flow."):
    """Norms of gradients, by the same reading of names that reads parameters: it only moves and turns entries."""
    norms = dict(zip(case.arrays["grad_names"].tolist(), case.arrays["grad_norms_f64"].tolist(), strict=True))
    names = {name: np.full(case.state.arrays[name].shape, i, float) for i, name in enumerate(case.state.arrays)}
    places = convert.flow(convert.State(names), prefix, config)
    known = list(case.state.arrays)
    squares = dict.fromkeys(known, 0.0)
    for place, gradient in zip(jax.tree.leaves(places), jax.tree.leaves(of_params), strict=True):
        for i in np.unique(place):
            squares[known[int(i)]] += float(np.square(np.asarray(gradient)[place == i]).sum())
    checked = [name for name in norms if name.startswith(prefix)]
    assert len(checked) > 100
    np.testing.assert_allclose([squares[name] ** 0.5 for name in checked], [norms[n] for n in checked], rtol=1e-6)


def test_float32_after_a_data_dependent_start(macow):
    case = macow("c_flow_16_L3_ddi", np.float32)
    config = convert.flow_config(case.state, "flow.")
    params, (z, levels), flow = convert.flow(case.state, "flow.", config), input_of(case, np.float32), flow_of(config)
    nats, (latents, _) = jax.jit(lambda params, z: log_prob(flow, params, z))(params, z)
    assert nats.dtype == np.float32
    np.testing.assert_allclose(layers.pack(config, latents), case.array("z", np.float32), rtol=1e-4, atol=1e-4)
    bits = likelihood.bits_per_dim(-nats - dequantize.log_jacobian(768, levels, "symmetric"), 768)
    np.testing.assert_allclose(bits, case.array("bits_per_dim"), rtol=1e-4)
    np.testing.assert_allclose(jax.jit(flow.inverse_and_log_det)(params, latents, None)[0], z, rtol=0, atol=1e-5)


def test_learned_noise_and_its_bounds(x64, macow):
    case = macow("e_vdq_16_L2")
    params, main, noise = convert.model(case.state)
    images = case.array("pixels", np.uint8).astype(float)
    samples = lambda name: np.moveaxis(case.array(name), 0, 1)  # [K, b, ...]
    dequantizer = dequantization.variational(noise, 3, 256, False)
    net = encoder.encoder(3, noise.condition_channels, noise.flow.num_halvings)
    features = jax.jit(net.apply)(params["dequantizer"]["encoder"], dequantize.scale(images, 256, "symmetric"))
    np.testing.assert_allclose(features, case.array("encoder_out"), rtol=1e-9, atol=1e-10)
    u, log_q = jax.jit(dequantizer.from_normal)(params["dequantizer"], samples("eps"), features)
    np.testing.assert_allclose(u, samples("u"), rtol=1e-9)
    np.testing.assert_allclose(log_q, samples("log_q"), rtol=1e-9)
    z = dequantize.scale(images + u, 256, "symmetric").reshape(-1, 16, 16, 3)
    log_p = jax.jit(lambda params, z: log_prob(flow_of(main), params, z)[0])(params["flow"], z).reshape(log_q.shape)
    np.testing.assert_allclose(log_p, samples("log_p"), rtol=1e-9)
    log_w = log_p - log_q + dequantize.log_jacobian(768, 256, "symmetric")
    for alpha, name in ((1.0, "bpd_elbo"), (0.0, "bpd_iw")):
        bits = likelihood.bits_per_dim(-bounds.renyi(log_w, alpha), 768)
        np.testing.assert_allclose(bits, case.array(name), rtol=1e-9)
    np.testing.assert_allclose(bounds.renyi(log_w, 1.0 - 1e-7), bounds.renyi(log_w, 1.0), rtol=1e-6)


def test_sigmoid(x64, macow):
    case = macow("d_sigmoid")
    x = case.array("x")
    np.testing.assert_allclose(dequantization.to_noise(x), case.array("y"), rtol=1e-9)
    np.testing.assert_allclose(dequantization.log_sigmoid_slope(x), case.array("logdet"), rtol=1e-9)


def post_of(macow, name, read):
    pre, post = (macow(name, np.float32, f"{when}/") for when in ("pre", "post"))
    return pre, read(pre.state), read(post.state)


def assert_trees_close(found, expected, rtol, atol):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_data_dependent_start_of_actnorm_and_of_a_step(macow):
    case, pre, post = post_of(macow, "d_init_actnorm", lambda state: convert.actnorm(state, ""))
    found, y = actnorm.init_from_batch(pre, case.array("data", np.float32))
    assert_trees_close(found, post, 1e-5, 1e-6)
    np.testing.assert_allclose(y, case.array("y", np.float32), rtol=1e-4, atol=1e-5)
    case, pre, post = post_of(macow, "d_init_step", lambda state: convert.step(state, ""))
    step = layers.step(6, Shape("macow", (2, 3), 16, True, 0, "lines"))
    found, y = jax.jit(step.init_from_batch)(pre, case.array("data", np.float32), None)
    assert_trees_close(found, post, 1e-5, 2e-6)
    np.testing.assert_allclose(y, case.array("y", np.float32), rtol=1e-4, atol=1e-5)
    _, log_det = jax.jit(step.forward_and_log_det)(found, case.array("data", np.float32), None)
    np.testing.assert_allclose(log_det, case.array("logdet", np.float32), rtol=1e-5)


def test_data_dependent_start_of_a_model_with_learned_noise(macow):
    """The released code starts its main flow without noise; the pieces are the same."""
    case, pre, post = post_of(macow, "e_init_vdq", lambda state: convert.model(state)[0])
    _, main, noise = convert.model(macow("e_init_vdq", np.float32, "pre/").state)
    data = case.array("data", np.float32)
    net = encoder.encoder(3, noise.condition_channels, noise.flow.num_halvings)
    of_encoder, features = jax.jit(net.init_from_batch)(pre["dequantizer"]["encoder"], data)
    assert_trees_close(of_encoder, post["dequantizer"]["encoder"], 1e-4, 1e-5)
    own = flow_of(noise.flow, noise.condition_channels)
    of_noise, _ = jax.jit(own.init_from_batch)(pre["dequantizer"]["flow"], case.array("eps", np.float32), features)
    assert_trees_close(of_noise, post["dequantizer"]["flow"], 1e-4, 1e-5)
    of_flow, latents = jax.jit(flow_of(main).init_from_batch)(pre["flow"], data, None)
    assert_trees_close(of_flow, post["flow"], 1e-4, 1e-5)
    np.testing.assert_allclose(layers.pack(main, latents), case.array("z", np.float32), rtol=1e-4, atol=1e-4)


def test_five_steps_of_adam(x64, macow):
    """The warm-up goes on as it should, and the learning rate decays after it."""
    pre, post = (macow("f_adam5", np.float64, f"{when}/") for when in ("pre", "post"))
    config = convert.flow_config(pre.state, "flow.")
    assert config == FlowConfig(((1,), (1,)), (8, 16), kernel=(2, 3))
    params, expected = (convert.flow(case.state, "flow.", config) for case in (pre, post))
    settings = OptimConfig("adam", 1e-3, "exponential", warmup_steps=3, exponential_rate=0.999997)
    optimizer, flow = optim.optimizer(settings, 5), flow_of(config)
    pixels, rate = pre.array("pixels", np.uint8), optim.schedule(settings, 5)

    @jax.jit
    def step(params, moments, u):
        z = dequantize.scale(pixels + u, 256, "symmetric")
        value, gradient = jax.value_and_grad(lambda params: -log_prob(flow, params, z)[0].mean())(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value, optax.tree.norm(gradient)

    moments = optimizer.init(params)
    for i, u in enumerate(pre.array("u")):
        np.testing.assert_allclose(rate(i), pre.arrays["lrs"][i], rtol=1e-6)
        params, moments, value, norm = step(params, moments, u)
        np.testing.assert_allclose(value, pre.arrays["losses"][i], rtol=1e-6)
        np.testing.assert_allclose(norm, pre.arrays["grad_norms"][i], rtol=1e-5)
    # The stored noise is rounded to float32, which Adam enlarges where a gradient is near zero; updates are 1e-3 each.
    assert_trees_close(params, expected, 2e-6, 5e-6)
    differences = jax.tree.leaves(jax.tree.map(lambda ours, theirs: np.abs(ours - theirs).ravel(), params, expected))
    assert np.quantile(np.concatenate(differences), 0.99) < 5e-8


def test_weight_norm_is_that_of_the_paper():
    key = jax.random.key(0)
    params = convolution.init(key, (2, 3), 4, 5) | {"gain": jnp.arange(1.0, 6.0)}
    norms = jnp.linalg.norm(convolution.effective(params)["kernel"].reshape(-1, 5), axis=0)
    np.testing.assert_allclose(norms, params["gain"], rtol=1e-6)
    assert math.isclose(float(convolution.init(key, (9, 9), 9, 9)["kernel"].std()), 0.05, rel_tol=0.05)
