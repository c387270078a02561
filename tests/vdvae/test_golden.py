"""Both networks, their likelihoods and gradients against what the reference implementations gave."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdvae import levels, model_stage, network, vae
from vdvae.config import ObjectiveConfig
from vdvae.layers import Arithmetic
from vdvae.network import Source

EFFICIENT = ("evdvae_unbounded_8bit_std", "evdvae_bounded_5bit_std", "evdvae_mnist_bernoulli")
PUBLISHED = ObjectiveConfig(kl_steps=5000, gamma_steps=10_000)


@pytest.fixture(scope="module", params=EFFICIENT)
def case(request, load_efficient):
    return load_efficient(request.param)


def noises(case, prefix="eps"):
    return [Source(noise=noise) for noise in case.layers(prefix)]


def kept(draw):
    posterior, prior = draw.posterior, draw.prior
    statistics = {"post_mean": posterior.mean, "post_std": posterior.std}
    statistics |= {"prior_mean": prior.mean, "prior_std": prior.std, "z": draw.z}
    return {"kl": draw.kl.sum((1, 2, 3)), **statistics}


def run(case, model=None, params=None, sources=None):
    """Outputs of the padded image, what is kept of each layer, -log p(x | z) in nats."""
    model = model or case.model

    @jax.jit
    def everything(params, image, sources):
        skips = network.bottom_up(model.net, params, vae.inputs(model, image))
        raw, layers = network.top_down(model.net, params, skips, sources, kept)
        top, left = levels.margins(model.config, model.facts.shape)
        height, width, _ = model.facts.shape
        cropped = raw[:, top : top + height, left : left + width]
        return raw, layers, model.output.nats(cropped, vae.target(model, image)), skips

    return everything(params or case.params, case.image, sources or noises(case))


@pytest.fixture(scope="module")
def found(case):
    return run(case)


def test_the_network_sees_what_was_recorded(case):
    x = np.moveaxis(case.arrays["x_nchw"], 1, -1)
    np.testing.assert_allclose(vae.inputs(case.model, case.image), x, atol=2e-7)


def test_outputs_and_latents_are_the_published_ones(case, found):
    raw, layers, _, _ = found
    np.testing.assert_allclose(raw, np.moveaxis(case.arrays["logits_nchw"], 1, -1), rtol=1e-4, atol=1e-4)
    for name in ("z", "post_mean", "post_std", "prior_mean", "prior_std"):
        for ours, theirs in zip(layers, case.layers(name), strict=True):
            np.testing.assert_allclose(ours[name], theirs, rtol=1e-4, atol=2e-5, err_msg=name)


def test_the_parts_of_the_bound_are_the_published_ones(case, found):
    _, layers, nats, _ = found
    dims = float(case.arrays["effective_dims"])
    assert case.model.num_dims == dims
    kl = np.stack([layer["kl"] for layer in layers])
    np.testing.assert_allclose(kl, case.arrays["kl_nats_per_layer_per_image"], rtol=1e-4)
    np.testing.assert_allclose(nats / dims, case.arrays["recon_nats_per_dim_per_image"], rtol=1e-4)
    bound = (nats + kl.sum(0)).mean() / dims
    np.testing.assert_allclose(bound, case.arrays["neg_elbo_nats_per_dim"], rtol=1e-5)
    np.testing.assert_allclose(bound / np.log(2.0), case.arrays["neg_elbo_bits_per_dim"], rtol=1e-5)
    # As the reference logs them: in bits per dimension or per element of the latents, of binary images in nats.
    logged = nats.mean() if case.model.facts.levels == 2 else nats.mean() / dims / np.log(2.0)
    np.testing.assert_allclose(logged, case.arrays["recon_metric_code"], rtol=1e-4)
    np.testing.assert_allclose(kl.sum(0).mean() / dims / np.log(2.0), case.arrays["kl_bits_per_dim"], rtol=1e-4)
    per_element = kl.mean(1) / case.arrays["latent_sizes"] / np.log(2.0)
    np.testing.assert_allclose(per_element, case.arrays["avg_kl_metric_per_layer_code"], rtol=1e-4)


@pytest.fixture(scope="module")
def objective(efficient):
    return objective_of(efficient)


def objective_of(case):
    """Loss at an update and its gradient as a function of both, the noise given."""
    sizes = np.asarray(case.arrays["latent_sizes"], np.float32)
    np.testing.assert_array_equal(sizes, [np.prod(shape) for shape in levels.latent_shapes(case.model.net.levels)])

    def loss(params, update):
        raw, kl = vae.infer(case.model, params, case.image, noises(case), vae.kl_of_image)
        nats, kl = case.model.output.nats(raw, vae.target(case.model, case.image)), jnp.stack(kl).mean(1)
        weights = model_stage.gamma(PUBLISHED, update, kl, sizes)
        return (nats.mean() + model_stage.beta(PUBLISHED, update) * (weights * kl).sum()) / case.model.num_dims

    both = jax.jit(jax.value_and_grad(loss))
    return lambda update: both(case.params, jnp.int32(update))


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFICIENT[1:])
def test_gradients_and_losses_of_the_others_are_the_published_ones_too(load_efficient, name):
    case = load_efficient(name)
    objective = objective_of(case)
    test_gradients_are_the_published_ones(case, objective)
    test_warm_up_and_balancing_give_the_published_losses(case, objective)
    test_balancing_acts_on_gradients_as_a_constant(case, objective)


def test_gradients_are_the_published_ones(efficient, objective):
    _, found = objective(20_000)
    compare_gradients(found, efficient.converted("grad/"))
    np.testing.assert_allclose(optax.tree.norm(found), efficient.arrays["step20000/grad_global_norm"], rtol=1e-4)


def compare_gradients(found, expected, limit=1e-4):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= limit * np.linalg.norm(theirs), jax.tree_util.keystr(path)


def test_warm_up_and_balancing_give_the_published_losses(efficient, objective):
    kl = efficient.arrays["kl_nats_per_layer_per_image"].mean(1)
    weights = model_stage.gamma(PUBLISHED, 5, kl, efficient.arrays["latent_sizes"])
    np.testing.assert_allclose(weights, efficient.arrays["gamma_coeff_step_le_max"], rtol=1e-4)
    for step in (5, 2500, 20_000):
        expected = efficient.arrays[f"step{step}/beta"]
        np.testing.assert_allclose(model_stage.beta(PUBLISHED, step), expected, rtol=1e-6)
        expected = efficient.arrays[f"step{step}/total_loss_nats_per_dim"]
        np.testing.assert_allclose(objective(step)[0], expected, rtol=1e-5)


def test_balancing_acts_on_gradients_as_a_constant(efficient, objective):
    _, found = objective(5)
    np.testing.assert_allclose(optax.tree.norm(found), efficient.arrays["step5/grad_global_norm"], rtol=1e-4)
    recorded = dict(zip(efficient.arrays["param_order"], efficient.arrays["step5/grad_l2_per_param"], strict=True))
    efficient.compare_norms(found, recorded)


def in_float64(case):
    model = case.model
    net = model.net._replace(arithmetic=Arithmetic(jnp.dtype("float64"), "default"))
    params, sources = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (case.params, noises(case)))
    return model._replace(net=net), params, sources


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFICIENT[1:])
def test_in_double_precision_the_other_bounds_are_exact_too(load_efficient, name):
    test_in_double_precision_the_bound_is_exact(load_efficient(name))


def test_in_double_precision_the_bound_is_exact(efficient):
    case = efficient
    with jax.enable_x64(True):
        model, params, sources = in_float64(case)
        output = model.output._replace(values=lambda x: values64(case, x))
        raw, layers, nats, _ = run(case, model._replace(output=output), params, sources)
        raw, nats, kl = np.asarray(raw), np.asarray(nats), np.stack([layer["kl"] for layer in layers])
    assert raw.dtype == np.float64
    np.testing.assert_allclose(kl, case.arrays["f64/kl_nats_per_layer_per_image"], rtol=1e-6)
    np.testing.assert_allclose(nats.mean() / model.num_dims, case.arrays["f64/recon_nats_per_dim"], rtol=1e-6)
    np.testing.assert_allclose(raw.mean(), case.arrays["f64/logits_nchw_mean"], rtol=1e-6, atol=1e-9)
    bound = (nats + kl.sum(0)).mean() / model.num_dims
    np.testing.assert_allclose(bound, case.arrays["f64/neg_elbo_nats_per_dim"], rtol=1e-6)


def values64(case, x):
    if case.model.facts.levels == 2:
        return x.astype(jnp.float64)
    return x.astype(jnp.float64) * (256 // case.model.facts.levels) / 127.5 - 1.0


def test_the_baseline_is_the_published_one(baseline):
    arrays = baseline.arrays
    np.testing.assert_allclose(vae.inputs(baseline.model, baseline.image), arrays["x_nhwc"], atol=1e-6)
    mean, deviation = baseline.model.config.whiten
    assert (-mean, 1.0 / deviation) == pytest.approx((float(arrays["shift"]), float(arrays["scale"])))
    target = baseline.model.output.values(vae.target(baseline.model, baseline.image))
    np.testing.assert_allclose(target, arrays["target_nhwc"], atol=2e-7)
    raw, layers, nats, skips = run(baseline)
    for level, of_level in zip(baseline.model.net.levels, skips, strict=True):
        expected = np.moveaxis(arrays[f"encoder_act/{level.height}"], 1, -1)
        np.testing.assert_allclose(of_level[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(raw, arrays["logits_nhwc"], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(layers, baseline.layers("z"), strict=True):
        np.testing.assert_allclose(ours["z"], theirs, rtol=1e-4, atol=2e-5)
    kl, dims = np.stack([layer["kl"] for layer in layers]), baseline.model.num_dims
    np.testing.assert_allclose(kl, arrays["kl_nats_per_layer_per_image"], rtol=1e-4)
    np.testing.assert_allclose(kl.sum(0).mean() / dims, arrays["rate_nats_per_dim"], rtol=1e-4)
    np.testing.assert_allclose(nats / dims, arrays["distortion_nats_per_dim_per_image"], rtol=1e-4)
    bound = (nats + kl.sum(0)).mean() / dims
    np.testing.assert_allclose(bound, arrays["elbo_nats_per_dim"], rtol=1e-5)
    np.testing.assert_allclose(bound / np.log(2.0), arrays["elbo_bits_per_dim"], rtol=1e-5)


def test_gradients_of_the_baseline_are_the_published_ones(baseline):
    def loss(params):
        raw, kl = vae.infer(baseline.model, params, baseline.image, noises(baseline), vae.kl_of_image)
        nats = baseline.model.output.nats(raw, vae.target(baseline.model, baseline.image))
        return (nats + jnp.stack(kl).sum(0)).mean() / baseline.model.num_dims

    found = jax.jit(jax.grad(loss))(baseline.params)
    # Where a mass is near 1e-5, the reference takes the difference of two sigmoids in float32.
    compare_gradients(found, baseline.converted("grad/"), limit=3e-4)
    np.testing.assert_allclose(optax.tree.norm(found), baseline.arrays["grad_global_norm"], rtol=1e-4)


def stream(baseline, sources):
    """The decoder's last stream after gain and bias: what the golden file kept of unconditional passes."""
    blocks = baseline.model.net.blocks._replace(
        write=lambda ends, y, _: y * ends["gain"]["scale"] + ends["gain"]["bias"]
    )
    net = baseline.model.net._replace(blocks=blocks)
    return jax.jit(lambda p: network.top_down(net, p, None, sources, lambda draw: None)[0])(baseline.params)


def test_the_baseline_draws_from_its_prior_as_published(baseline):
    temperature = baseline.arrays["uncond/temperature"]
    sources = [Source(prior_noise=noise, temperature=temperature) for noise in baseline.layers("uncond/eps")]
    expected = np.moveaxis(baseline.arrays["uncond/px_z_nchw"], 1, -1)
    np.testing.assert_allclose(stream(baseline, sources), expected, rtol=1e-4, atol=1e-4)


def test_latents_may_be_given_for_the_first_layers(baseline):
    given = [Source(given=z) for z in baseline.layers("z")[:2]]
    noise = [np.moveaxis(baseline.arrays[f"manual2/eps_for_layer/{i:02}"], 1, -1) for i in range(2, 6)]
    free = [Source(prior_noise=eps, temperature=np.float32(0.1)) for eps in noise]
    expected = np.moveaxis(baseline.arrays["manual2/px_z_nchw"], 1, -1)
    np.testing.assert_allclose(stream(baseline, given + free), expected, rtol=1e-4, atol=1e-4)
