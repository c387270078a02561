"""The other passes of the golden network: from the prior, masked, four steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import distributions, optim, sharding
from bitsperdim import state as state_lib
from bitsperdim import step as step_lib
from bitsperdim.facts import Facts
from bitsperdim.model import Aux, Model
from vdvae import coding, levels, model_stage, network, outputs, vae
from vdvae.config import ModelConfig, ObjectiveConfig
from vdvae.network import Source

NUM_STEPS = 4


OTHERS = ("evdvae_bounded_5bit_std", "evdvae_mnist_bernoulli")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_networks_draw_and_mix_as_published_too(load_efficient, name):
    test_samples_from_the_prior_are_the_published_ones(load_efficient(name))
    test_known_and_free_latents_mix_as_published(load_efficient(name))


def test_samples_from_the_prior_are_the_published_ones(efficient):
    arrays, model = efficient.arrays, efficient.model
    temperatures = coding.by_layer(model, arrays["prior_sample/temperatures_per_level"].tolist())
    noise = efficient.layers("prior_sample/eps")
    sources = [Source(prior_noise=eps, temperature=np.float32(t)) for eps, t in zip(noise, temperatures, strict=True)]
    generate = jax.jit(lambda params: vae.generate(model, params, sources, lambda draw: draw.z))
    raw, z = generate(efficient.params)
    top, left = levels.margins(model.config, model.facts.shape)
    expected = np.moveaxis(arrays["prior_sample/logits_nchw"], 1, -1)[:, top : 32 - top, left : 32 - left]
    np.testing.assert_allclose(raw, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(z, efficient.layers("prior_sample/z"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if model.facts.levels == 2:
        return
    uniforms = [np.moveaxis(arrays[f"prior_sample/{name}_uniform"], 1, -1) for name in ("mixture", "logistic")]
    mixture = distributions.logistic_mixture(raw, 3, outputs.log_scale(model.config))
    image = distributions.sample_mixture(
        mixture, *uniforms, outputs.bins(model.config, model.facts.levels), rounds=False
    )
    np.testing.assert_allclose(image, np.moveaxis(arrays["prior_sample/image_nchw"], 1, -1), atol=2e-5)


def test_known_and_free_latents_mix_as_published(efficient):
    arrays = efficient.arrays
    mask = arrays["variate_mask"].astype(np.float32)
    both = zip(efficient.layers("masked/eps_post"), efficient.layers("masked/eps_prior"), mask, strict=True)
    sources = [Source(noise=known, prior_noise=free, mask=kept) for known, free, kept in both]
    infer = jax.jit(lambda params: vae.infer(efficient.model, params, efficient.image, sources, vae.kl_of_image))
    raw, kl = infer(efficient.params)
    nats = efficient.model.output.nats(raw, vae.target(efficient.model, efficient.image))
    expected = arrays["masked/recon_nats_per_dim"]
    np.testing.assert_allclose(nats.mean() / efficient.model.num_dims, expected, rtol=1e-4)
    if efficient.model.facts.levels > 2:  # that of MNIST is a mean over its border too, which is cut off here
        np.testing.assert_allclose(np.abs(raw).mean(), arrays["masked/logits_mean_abs"], rtol=1e-4)
    np.testing.assert_allclose(kl, arrays["masked/kl_nats_per_layer_per_image_unmasked_sum"], rtol=1e-4)


def recorded_model(case):
    """The published objective, its noise taken from the batch."""
    objective = ObjectiveConfig(kl_steps=5000, gamma_steps=10_000)
    shapes = levels.latent_shapes(case.model.net.levels)
    sizes = jnp.asarray([float(np.prod(shape)) for shape in shapes])

    def loss(params, extra, batch, key, step):
        sources = [Source(noise=batch[f"eps_{i}"]) for i in range(len(shapes))]
        raw, kl = vae.infer(case.model, params, batch["image"], sources, vae.kl_of_image)
        nats, kl = case.model.output.nats(raw, vae.target(case.model, batch["image"])), jnp.stack(kl).mean(1)
        weights = model_stage.beta(objective, step + 1) * model_stage.gamma(objective, step + 1, kl, sizes)
        return (nats.mean() + (weights * kl).sum()) / case.model.num_dims, Aux({}, (), ())

    return Model(lambda key: (jax.tree.map(jnp.asarray, case.params), {}), loss, loss, lambda means, tallies: means)


@pytest.mark.slow
def test_four_steps_of_training_are_the_published_ones(efficient, golden):
    expected = golden("vdvae/evdvae_train4_adamax")
    model, mesh = recorded_model(efficient), sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))
    settings = step_lib.TrainConfig(
        batch_size=2, steps=NUM_STEPS, ema_decay=float(expected["ema_decay"]), ema_ramp=False
    )
    adamax = optim.OptimConfig(name="adamax", learning_rate=float(expected["lr"]))
    optimizer = optim.optimizer(adamax, NUM_STEPS)
    like = state_lib.abstract(model, optimizer, jax.random.key(0), mesh, sharding.MeshConfig())
    step = step_lib.compiled(model, adamax, settings, 0, mesh, like)
    state = state_lib.create(model, optimizer, jax.random.key(0), like)
    for number in range(1, NUM_STEPS + 1):
        noise = efficient._replace(arrays=expected | {"n_layers": 6}).layers(f"step{number}/eps")
        batch = {"image": efficient.image} | {f"eps_{i}": eps for i, eps in enumerate(noise)}
        state, report = step(state, batch)
        np.testing.assert_allclose(report.figures["objective"][0], expected[f"step{number}/loss"], rtol=1e-4)
        norm = report.figures["gradient_norm"][0]
        np.testing.assert_allclose(norm, expected[f"step{number}/grad_global_norm"], rtol=1e-4)
        recorded = dict(zip(efficient.arrays["param_order"], expected[f"step{number}/param_l2"], strict=True))
        efficient.compare_norms(jax.device_get(state["params"]), recorded)
    assert_close_but_for_signs(state["params"], efficient._replace(arrays=expected).converted("param_after4/"), 1e-4)
    assert_close_but_for_signs(state["ema"], efficient._replace(arrays=expected).converted("ema_after4/"), 1e-6)


def assert_close_but_for_signs(found, expected, limit):
    """Adamax moves an element by the whole rate, whatever the size of its gradient: of one near zero the sign is that
    of rounding errors."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    errors = np.abs(ours - theirs)
    assert (errors > limit).mean() < 1e-3 and errors.max() < 2.1e-3 * NUM_STEPS


def small(scan=False, remat=0):
    """Levels of one pixel and of 4x4: layers that share a skip connection and that do not, and plain blocks."""
    config = ModelConfig(
        strides=(1, 4),
        layers=(1, 5),
        skips=(1, 3),
        blocks=(1, 4),
        widths=(4, 4),
        bottlenecks=(0.5, 0.5),
        kernels=(1, 3),
        latents=(2, 2),
        mixtures=1,
        scan=scan,
        remat=remat,
    )
    return vae.make(config, Facts((4, 4, 1), 17))


def mixed_sources():
    """Of each kind some, alike ones behind each other."""
    noise = [
        np.random.default_rng(i).normal(size=(2, edge, edge, 2)).astype(np.float32)
        for i, edge in enumerate((1, *(4,) * 5))
    ]
    return [
        Source(noise=noise[0]),
        Source(noise=noise[1]),
        Source(noise=noise[2]),
        Source(noise=noise[3], prior_noise=noise[4], mask=np.float32([1, 0])),
        Source(prior_noise=noise[4], temperature=np.float32(0.7)),
        Source(prior_noise=noise[5], temperature=np.float32(0.5)),
    ]


def value_and_gradients(model, sources):
    params = vae.init(model, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * np.random.default_rng(1).normal(size=leaf.shape), params)
    image = np.random.default_rng(2).integers(0, 17, (2, 4, 4, 1), np.uint8)
    keep = lambda draw: (draw.z, None if draw.kl is None else draw.kl.sum((1, 2, 3)))

    def loss(params):
        raw, kept = vae.infer(model, params, image, sources, keep)
        divergence = sum(kl.sum() for _, kl in kept if kl is not None)
        return model.output.nats(raw, vae.target(model, image)).sum() + divergence, kept

    function = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(function)(params), str(jax.make_jaxpr(function)(params))


def all_posterior():
    return network.posterior_sources(jax.random.split(jax.random.key(0), 2), 6)


@pytest.mark.parametrize("sources", [all_posterior, pytest.param(mixed_sources, marks=pytest.mark.slow)])
def test_a_loop_over_layers_and_recomputation_change_nothing(sources):
    expected, program = value_and_gradients(small(), sources())
    assert "scan" not in program
    found, program = value_and_gradients(small(scan=True, remat=4), sources())
    assert "scan" in program
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(np.abs(theirs).max(), 1e-3))


def stored(model):
    """Numbers that the loops over layers keep for the backward pass."""
    sources = all_posterior()
    params = jax.eval_shape(lambda: vae.init(model, jax.random.key(0)))
    image = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.uint8)

    def loss(params, image):
        raw, kl = vae.infer(model, params, image, sources, vae.kl_of_image)
        return model.output.nats(raw, vae.target(model, image)).sum() + jnp.stack(kl).sum()

    equations = jax.make_jaxpr(jax.grad(loss))(params, image).jaxpr.eqns
    loops = [equation for equation in equations if equation.primitive.name == "scan"]
    assert loops
    forward = loops[: len(loops) // 2]
    return sum(out.aval.size for loop in forward for out in loop.outvars[loop.params["num_carry"] :])


def test_recomputation_keeps_little_and_without_it_each_convolution_its_input_alone():
    model = small(scan=True)
    level = model.net.levels[1]
    streams = level.layers * 2 * level.height * level.columns * level.width
    # A layer has 13 convolutions behind activations, z and its statistics, and inputs of other convolutions.
    assert stored(small(scan=True, remat=4)) < 4 * streams < stored(model) < 24 * streams


def test_given_latents_give_the_image_they_were_inferred_from():
    """Reconstruction, and sampling with the posterior of every layer, are one function."""
    model = small()
    generator = np.random.default_rng(1)
    normal = lambda leaf: (0.5 * generator.normal(size=leaf.shape)).astype(np.float32)
    params = jax.tree.map(normal, vae.init(model, jax.random.key(0)))
    image = np.random.default_rng(2).integers(0, 17, (8, 4, 4, 1), np.uint8)
    latents = jax.jit(lambda params: coding.encoded(model, params, image))(params)
    decode = jax.jit(lambda params, latents: coding.decoded(model, params, latents))
    at_once = np.asarray(jax.jit(lambda params: coding.reconstructed(model, params, image))(params))
    assert (np.asarray(decode(params, latents)) == at_once).mean() > 0.98  # values half way between two levels
    rolled = np.asarray(decode(params, [np.roll(z, 1, 0) for z in latents]))
    assert (rolled == np.roll(at_once, 1, 0)).mean() > 0.98 and (rolled != at_once).mean() > 0.05


def test_noise_of_an_example_is_its_own_and_differs_by_layer_and_purpose(efficient):
    keys = jax.random.split(jax.random.key(0), 3)
    net, shape = efficient.model.net, (16, 16, 4)
    draw = lambda sources, layer: np.asarray(jax.vmap(lambda key: net.latent.noise(key, shape))(sources[layer].noise))
    whole = network.posterior_sources(keys, 6)
    np.testing.assert_array_equal(draw(whole, 2)[1:2], draw(network.posterior_sources(keys[1:2], 6), 2))
    first, second = draw(whole, 1).ravel(), draw(whole, 2).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
