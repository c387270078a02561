"""Bounds against an enumerated likelihood, noise that never leaves its level, and constants of bits/dim."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import dequantize, rng, sharding
from bitsperdim.errors import InputError
from bitsperdim.facts import Facts
from bitsperdim.sharding import MeshConfig
from flows import bounds, density, dequantization, stage
from flows.config import DequantizationConfig, FlowConfig, ModelConfig

ONE = FlowConfig(((1,),), (4,))
NOISE = DequantizationConfig(FlowConfig(((1,),), (4,)), 2)


def parameters(model, scale=0.1, log_scale=0.4):
    """Away from the start, drawn without compiling it. Actnorms spread what masked convolutions contract: noise then
    reaches all of its cell."""
    generator = np.random.default_rng(3)
    middle = {
        "log_scale": lambda leaf: log_scale,
        "gain": lambda leaf: 0.5,
        "matrix": lambda leaf: np.eye(leaf.shape[-1]),
    }

    def draw(path, leaf):
        centre = middle.get(path[-1].key, lambda leaf: 0.0)(leaf)
        return jnp.asarray(centre + scale * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def keys_of(count, key=0):
    return rng.per_example(jax.random.key(key), jnp.arange(count))


@pytest.mark.parametrize("noise", [None, NOISE], ids=["uniform", "variational"])
def test_the_importance_weighted_bound_rises_to_the_likelihood(noise):
    """Images of 2x2 pixels of 2 bits: P(x) by integrating p(x + u) over a fine grid of u in [0, 1)^4."""
    model = density.make(ModelConfig(ONE, noise, chunk=1024), Facts((2, 2, 1), 4))
    params = {"flow": parameters(model, log_scale=0.1)["flow"], "dequantizer": parameters(model)["dequantizer"]}
    grid = (np.arange(16) + 0.5) / 16
    u = np.stack(np.meshgrid(*[grid] * 4, indexing="ij"), -1).reshape(-1, 2, 2, 1)
    images = (
        np.stack(np.meshgrid(*[range(4)] * 4, indexing="ij"), -1).reshape(-1, 2, 2, 1).astype(np.uint8)[[0, 90, 201]]
    )
    log_prob = jax.jit(model.log_prob)
    true = np.array(
        [np.logaddexp.reduce(log_prob(params, x + u.astype(np.float32))) - math.log(len(u)) for x in images]
    )
    repeated = np.repeat(images, 64, 0)
    log_w, _ = jax.jit(model.log_weights, static_argnums=3)(params, repeated, keys_of(len(repeated)), 1024)
    gaps = {}
    for count in (1, 16, 1024):
        # The bound with `count` samples, in its mean over all groups of so many, and the error of that mean.
        groups = jax.vmap(lambda group: bounds.renyi(group, 0.0))(log_w.reshape(-1, count, len(repeated)))
        own = true[:, None] - np.asarray(groups, np.float64).reshape(-1, 3, 64).swapaxes(0, 1).reshape(3, -1)
        gaps[count], error = own.mean(1), own.std(1) / own.shape[1] ** 0.5
        assert (gaps[count] > -4.0 * error - 2e-3).all(), "above the likelihood"
    assert (gaps[1] > 5e-3).all() and (gaps[1] > 4.0 * gaps[16]).all()
    assert (np.abs(gaps[1024]) < 4.0 * error + 5e-3).all(), "still below the likelihood"
    elbo = bounds.renyi(log_w, 1.0).reshape(3, 64).mean(1)
    np.testing.assert_allclose(true - elbo, gaps[1], atol=1e-3)


def test_the_density_over_the_levels_is_normalised():
    """The integral of p(y) over all y sums to one, so the constants of scaling are right: one pixel, on 3 levels."""
    for range in ("symmetric", "unit"):
        model = density.make(ModelConfig(ONE, range=range), Facts((1, 1, 1), 3))
        y = np.linspace(-120.0, 123.0, 200_001, dtype=np.float32)
        p = np.exp(
            np.asarray(jax.jit(model.log_prob)(parameters(model, log_scale=0.0), y.reshape(-1, 1, 1, 1)), np.float64)
        )
        assert np.trapezoid(p, y) == pytest.approx(1.0, abs=1e-4)


def test_bounds_of_all_orders_are_those_of_their_formula():
    log_w = jnp.array([[0.0, 1.0], [2.0, -1.0], [1.0, 3.0]])
    w = np.exp(np.asarray(log_w, np.float64))
    np.testing.assert_allclose(bounds.renyi(log_w, 0.0), np.log(w.mean(0)), rtol=1e-6)
    np.testing.assert_allclose(bounds.renyi(log_w, 1.0), np.log(w).mean(0), rtol=1e-6)
    np.testing.assert_allclose(bounds.renyi(log_w, -1.0), np.log((w**2).mean(0)) / 2.0, rtol=1e-6)
    np.testing.assert_allclose(bounds.renyi(log_w[:1], 0.0), bounds.renyi(log_w[:1], 1.0), rtol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_noise_never_leaves_its_level(levels):
    """Saturated noise included, after scaling to the input of a flow and back."""
    v = jnp.concatenate([jnp.linspace(-200.0, 200.0, 4001), jnp.array([-jnp.inf, jnp.inf])])
    u = dequantization.to_noise(v)
    assert u.dtype == jnp.float32 and (u >= 0.0).all() and (u < 1.0).all()
    x = jnp.arange(levels, dtype=jnp.uint8)[:, None]
    y = x + u
    np.testing.assert_array_equal(jnp.floor(y), jnp.broadcast_to(x, y.shape))
    if levels != 17:  # no power of two: the last value of the noise may round
        back = dequantize.unscale(dequantize.scale(y, levels, "symmetric"), levels, "symmetric")
        np.testing.assert_array_equal(jnp.floor(back), jnp.broadcast_to(x, y.shape))


def test_drawn_noise_has_the_density_that_it_claims(x64):
    """E_q[1 / q(u | x)] = 1, the volume of the unit cube, where q reaches all of it."""
    dequantizer = dequantization.variational(NOISE, 1, 4, False)
    params = parameters(dequantizer)
    image = jnp.array([[[[1], [3]]]], jnp.uint8)
    keys = keys_of(200_000)[:, None]
    u, log_q = jax.jit(dequantizer.draw)(params, image, keys)
    assert np.exp(-log_q).mean() == pytest.approx(1.0, abs=0.02)
    # A histogram knows q too.
    inside = (u[..., 0, 0] > 0.3) & (u[..., 0, 0] < 0.6) & (u[..., 1, 0] > 0.2) & (u[..., 1, 0] < 0.5)
    assert (inside[:, 0, 0] * np.exp(-log_q[:, 0])).mean() == pytest.approx(0.09, abs=0.005)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["uniform", "variational"])
def test_devices_share_the_samples_of_their_own_images(noise):
    """Of several samples none crosses from one device to another: each computes an eighth."""
    glow = FlowConfig(((1,),), (4,), kind="glow", factor=2)
    model, mesh = density.make(ModelConfig(glow, noise), Facts((4, 4, 1), 17)), sharding.make_mesh(MeshConfig())
    over, like = sharding.over_batch(mesh), jax.ShapeDtypeStruct
    weights = lambda params, images, position: (
        model.log_weights(params, images, rng.per_example(jax.random.key(0), position), 4)[0].T
    )
    given = like((8, 4, 4, 1), jnp.uint8, sharding=over), like((8,), jnp.int32, sharding=over)
    program = jax.jit(weights, out_shardings=over).lower(jax.eval_shape(model.init, jax.random.key(0)), *given)
    text = program.compile().as_text()
    assert not re.findall("all-gather|all-to-all|collective-permute|all-reduce", text)


def test_the_objective_has_its_order_and_figures_say_what_they_are(monkeypatch):
    log_w = jnp.array([[0.0, 1.0], [2.0, -1.0], [1.0, 3.0]])
    seen = []

    def log_weights(params, images, keys, samples):
        seen.append(np.asarray(images))
        return log_w[:samples], jnp.zeros((samples, len(images))) + jnp.array([1.0, 2.0])

    monkeypatch.setattr(density, "make", lambda config, about: Fake(log_weights))
    images = jnp.arange(8, dtype=jnp.uint8).reshape(2, 2, 2, 1)
    batch, key = {"image": images, "position": jnp.arange(2)}, jax.random.key(0)
    w, bits = np.exp(np.asarray(log_w, np.float64)), 1.0 / (4 * math.log(2.0))
    for alpha, samples, name in ((0.0, 2, "importance_weighted_2"), (-1.0, 3, "renyi_-1_3"), (1.0, 2, None)):
        model = stage.make(ModelConfig(ONE, samples=samples, alpha=alpha), Facts((2, 2, 1), 17), 3)
        objective, aux = model.loss({}, {}, batch, key, 0)
        order = 1.0 - alpha
        each = np.log((w[:samples] ** order).mean(0)) / order if order else np.log(w[:samples]).mean(0)
        np.testing.assert_allclose(objective, -each.mean(), rtol=1e-6)
        elbo = -np.log(w[:samples]).mean(0)
        np.testing.assert_allclose(aux.parts["nats"], elbo, rtol=1e-6)
        np.testing.assert_allclose(aux.parts["bits_per_dim"], elbo * bits, rtol=1e-6)
        assert [part for part in aux.parts if "importance" in part or "renyi" in part] == (
            [f"bits_per_dim_{name}"] if name else []
        )
        if name:
            np.testing.assert_allclose(aux.parts[f"bits_per_dim_{name}"], -each * bits, rtol=1e-6)
        measured = model.measure({}, {}, batch, key).parts
        figures = model.summarize({name: float(value.mean()) for name, value in measured.items()}, ())
        bound, weighted = -np.log(w).mean() * bits, -np.log(w.mean(0)).mean() * bits
        assert figures["bits_per_dim"] == pytest.approx(bound)
        assert figures["bits_per_dim_importance_weighted_3"] == pytest.approx(weighted)
        assert figures["dequantization_gap_bits_per_dim"] == pytest.approx(bound - weighted)
        assert figures["noise_entropy_bits_per_dim"] == pytest.approx(-1.5 * bits)
    assert all((some == images).all() for some in seen)
    # Training images are mirrored where the config says so, those that are measured are not.
    model = stage.make(ModelConfig(ONE, flip=True), Facts((2, 2, 1), 17), 3)
    seen.clear()
    for i in range(4):
        model.loss({}, {}, batch, jax.random.key(i), 0)
    assert any((some == images[:, :, ::-1]).all((1, 2, 3)).any() for some in seen)
    model.measure({}, {}, batch, key)
    np.testing.assert_array_equal(seen[-1], images)


class Fake(NamedTuple):
    """Of a density what the stage asks for."""

    log_weights: Callable


def test_chunks_change_nothing():
    about, image = Facts((4, 4, 1), 17), jnp.arange(48, dtype=jnp.uint8).reshape(3, 4, 4, 1) % 17
    values = []
    for chunk in (2, 6):
        model = density.make(ModelConfig(ONE, chunk=chunk, measured_samples=1), about)
        loss = lambda params, model=model: bounds.renyi(model.log_weights(params, image, keys_of(3), 6)[0], 0.0).mean()
        values.append(jax.jit(jax.value_and_grad(loss))(parameters(model)))
    for ours, theirs in zip(*map(jax.tree.leaves, values), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_images_that_cannot_be_halved_are_refused_by_name():
    flow = FlowConfig(((1,), (1,), (1,)), (4, 4, 4))
    with pytest.raises(InputError, match=r"images are 6x8, but model\.flow\.steps has 3 levels: .* multiples of 4"):
        density.make(ModelConfig(flow), Facts((6, 8, 3), 256))
    with pytest.raises(InputError, match=r"model\.dequantization\.flow\.steps"):
        density.make(ModelConfig(ONE, DequantizationConfig(flow)), Facts((6, 8, 3), 256))
    wide = dataclasses.replace(flow, factor=5)
    with pytest.raises(InputError, match=r"model\.flow\.factor=5 would split nothing off"):
        density.make(ModelConfig(wide), Facts((8, 8, 1), 256))
    assert density.make(ModelConfig(wide), Facts((8, 8, 3), 256)).latent_shapes == ((4, 4, 2), (2, 2, 40))


def test_orders_that_are_no_number_are_refused():
    with pytest.raises(ValueError, match="alpha must be finite, not inf"):
        ModelConfig(ONE, alpha=math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (4,)}, "widths must be 2 positive numbers"),
        ({"steps": ((1, 1), (1,))}, r"steps must have at most 1 number\(s\) in level 0"),
        ({"steps": ((1,), (0,))}, "steps must name one or more"),
        ({"kernel": (2, 2)}, "kernel must be .* with across odd"),
        ({"kind": "realnvp"}, "kind must be one of macow, glow"),
        ({"memory": "reversible"}, "memory must be 'plain' or 'remat' for 'macow'"),
        ({"kind": "glow"}, "factor must be 2 for 'glow'"),
    ],
)
def test_flows_that_cannot_be_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FlowConfig(((1,), (1,)), (4, 4)), **change)
