"""Computing in bfloat16, and computing activations twice: what is lost, and what must not be."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim import config as config_lib
from bitsperdim import config_files, data
from bitsperdim import run as run_lib
from vqvae2 import autoencoder_stage, chain, facts, prior_stage, quantizer

KEY = jax.random.key(0)
# Programs that run once: the compiler spends most of its time on making them fast.
QUICK = {"xla_backend_optimization_level": "0"}
NUM_CODES = 32
GRIDS = {"top": (2, 2), "bottom": (4, 4)}
LEVELS = tuple(GRIDS)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(stage, values)` -> run and model of a tiny stage with some values of its network replaced."""

    def built(stage, values=()):
        config = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
        config["data"]["image_size"] = 16
        config[stage]["model"] |= dict(values)
        run = run_lib.check(tmp_path_factory.mktemp("run") / "none", config)
        if stage == "autoencoder":
            return run, autoencoder_stage.make(run.config.autoencoder.model, facts.of_run(run), batch_size=8)
        return run, prior_stage.make(run, stage)

    return built


@pytest.fixture(scope="module")
def variables():
    """`variables(model)` -> params and extra of the shapes that `init` makes; no branch is silent."""

    def draw(model):
        generator = np.random.default_rng(0)
        scale = lambda leaf: (2.0 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.1
        normal = lambda leaf: (scale(leaf) * generator.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.tree.map(normal, jax.eval_shape(model.init, KEY))

    return draw


def batch(stage):
    position = np.arange(8, dtype=np.int32)
    if stage == "autoencoder":
        source = data.open_source(data.DataConfig("photos", image_size=16), "train")
        return {**source.read(position * 100), "position": position}
    codes = np.random.default_rng(1).integers(0, NUM_CODES, (8, 4, 4), np.int32)
    return {"bottom": codes, "top": codes[:, :2, :2], "position": position}


def loss_and_gradients(model, params, extra, given):
    value_and_grad = jax.value_and_grad(
        lambda params: model.loss(params, extra, given, KEY, jnp.int32(0)), has_aux=True
    )
    return jax.jit(value_and_grad, compiler_options=QUICK)(params)


def types(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("stage", ["autoencoder", *LEVELS])
def test_in_bfloat16_all_that_is_kept_and_reported_is_float32_and_near_the_float32_loss(make, variables, stage):
    given = batch(stage)
    _, exact = make(stage)
    _, rough = make(stage, {"dtype": "bfloat16"})
    assert types(jax.eval_shape(rough.init, KEY)) <= {"float32", "int32"}
    params, extra = variables(exact)
    loss = lambda model: jax.jit(model.loss, compiler_options=QUICK)(params, extra, given, KEY, jnp.int32(0))
    (expected, _), (objective, aux) = loss(exact), loss(rough)
    assert types((objective, aux)) == {"float32"}
    assert types(jax.eval_shape(jax.grad(lambda params: rough.loss(params, extra, given, KEY, 0)[0]), params)) == {
        "float32"
    }
    assert types(jax.eval_shape(rough.measure, params, extra, given | {"mask": np.ones(8, bool)}, KEY)) == {"float32"}
    # Not the same number: something was computed in bfloat16, which keeps two to three digits.
    assert objective != expected
    assert float(objective) == pytest.approx(float(expected), rel=0.03)


@pytest.mark.parametrize("stage", LEVELS)
def test_the_logits_of_a_prior_in_bfloat16_are_float32(make, variables, stage):
    run, model = make(stage, {"dtype": "bfloat16"})
    params, extra = variables(model)
    net, given = chain.network(run, stage), batch(stage)
    apply = lambda params: net.apply({"params": params, **extra}, given[stage], chain.upper(run, stage, given))
    jaxpr = str(jax.make_jaxpr(apply)(params))
    assert "bf16" in jaxpr
    assert jax.eval_shape(apply, params).dtype == jnp.float32


def test_an_autoencoder_in_bfloat16_takes_the_nearest_vectors_to_the_digit_that_it_has(make, variables):
    run, model = make("autoencoder", {"dtype": "bfloat16"})
    params, extra = variables(model)
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    apply = jax.jit(lambda tables, x: net.apply({"params": params}, x, tables)[1:])
    x = np.random.default_rng(2).uniform(-1, 1, (16, 16, 16, 3)).astype(np.float32)
    tables = {level: book.embedding for level, book in extra["codebooks"].items()}
    for level in LEVELS:  # encoder vectors themselves, so that many codes are taken
        tables[level] = apply(tables, x)[0][level].astype(np.float32).reshape(-1, 8)[:NUM_CODES]
    z, quantized = apply(tables, x)
    for level in LEVELS:
        assert z[level].dtype == jnp.bfloat16
        vectors = np.asarray(z[level], np.float64).reshape(-1, 1, 8)
        distances = np.square(vectors - np.asarray(tables[level], np.float64)).sum(-1)
        codes = np.asarray(quantized[level].codes).ravel()
        np.testing.assert_allclose(distances[np.arange(len(codes)), codes], distances.min(1), atol=1e-6)
        upcast = quantizer.quantize(tables[level], z[level].astype(jnp.float32))
        np.testing.assert_array_equal(quantized[level].codes, upcast.codes)
        assert len(np.unique(codes)) > 16  # the comparison is not one of constants


def primitives(jaxpr):
    """The names of all operations, those inside others included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            names |= primitives(inner)
    return names


@pytest.mark.parametrize("stage", LEVELS)
def test_activations_that_are_computed_again_change_no_loss_and_no_gradient(make, variables, stage):
    given, found = batch(stage), {}
    for remat in (False, True):
        _, model = make(stage, {"remat": remat, "layers": 2, "dropout": 0.3})
        params, extra = variables(model)
        found[remat] = loss_and_gradients(model, params, extra, given)
        objective = lambda params, model=model, extra=extra: model.loss(params, extra, given, KEY, jnp.int32(0))[0]
        used = primitives(jax.make_jaxpr(jax.grad(objective))(params).jaxpr)
        assert bool(used & {"remat", "remat2", "checkpoint"}) == remat
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[True], found[False])
