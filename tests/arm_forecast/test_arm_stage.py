"""What an ARM and its modules are trained on, against sums taken by hand, and which gradients reach what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arm_forecast import arm_stage, gumbel, modules, pixelcnn
from arm_forecast.config import ArmStageConfig, ModulesConfig
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import rng
from bitsperdim.errors import InputError
from bitsperdim.optim import OptimConfig
from bitsperdim.step import TrainConfig

GRID = Grid(4, 4, 1, 3)
NETWORK = NetworkConfig(resnets=1, filters=4, dropout=0.0)
KEY = jax.random.key(7)


def stage_config(**forecast):
    return ArmStageConfig(NETWORK, OptimConfig("adam", 1e-3), TrainConfig(2, 1), ModulesConfig(**forecast))


def two_modules(**more):
    return stage_config(modules=2, filters=4, weight=0.3, **more)


@pytest.fixture(scope="module")
def batch():
    image = np.random.default_rng(0).integers(0, 3, (2, 4, 4, 1)).astype(np.uint8)
    return {"image": image, "position": jnp.array([5, 9])}


@pytest.fixture(autouse=True)
def small_trunk(monkeypatch):
    """A causal network of two matrices in the place of the trunk: what is tested is what the stage makes of it."""

    def hidden(params, config, grid, x, keys=None):
        before = jnp.pad(jax.nn.one_hot(x[..., 0], 3), ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        return jnp.tanh(before @ params["trunk"])

    monkeypatch.setattr(pixelcnn, "hidden", hidden)
    monkeypatch.setattr(pixelcnn, "logits", lambda params, config, grid, h: (h @ params["head"])[..., None, :])


@pytest.fixture(scope="module")
def params():
    # The noise is an input, so that one set of weights serves all tests.
    key, forecast = jax.random.key(1), ModulesConfig(modules=2, filters=4, inputs=("noise",))
    arm = {"trunk": 2 * jax.random.normal(key, (3, 4)), "head": 2 * jax.random.normal(jax.random.key(2), (4, 3))}
    return {"arm": arm, "modules": modules.init(key, forecast, 4, GRID)}


def trained(config, params, batch):
    """Objective, parts and gradient of a training step."""
    model = arm_stage.make(config, GRID, "image")
    value = lambda params: model.loss(params, {}, batch, KEY, jnp.int32(0))
    (objective, aux), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return objective, aux.parts, gradient


def by_hand(params, batch, posterior=None):
    """-log P(x) and sum_t KL_t of each example, summed in double precision from the logits."""
    x = jnp.asarray(batch["image"], jnp.int32)
    h = pixelcnn.hidden(params["arm"], NETWORK, GRID, x)
    logits = pixelcnn.logits(params["arm"], NETWORK, GRID, h)
    inputs = {}
    if posterior is not None:
        keys = rng.per_example(rng.for_purpose(KEY, "posterior"), batch["position"])
        inputs = {"noise": posterior(keys, logits, x).reshape(2, 4, 4, 3)}
    forecast = np.asarray(modules.whole(params["modules"], GRID, h, inputs), np.float64).reshape(2, 16, 2, 3)
    probabilities = lambda mu: np.exp(mu) / np.exp(mu).sum(-1, keepdims=True)
    p, q = probabilities(np.asarray(logits, np.float64).reshape(2, 16, 3)), probabilities(forecast)
    nats = -np.log(np.take_along_axis(p, np.asarray(x).reshape(2, 16, 1), -1)).sum((1, 2))
    kl = sum((p[:, t:] * np.log(p[:, t:] / q[:, : 16 - t, t])).sum((1, 2)) for t in range(2))
    return nats, kl


def plain(params):
    return params | {"modules": {name: leaf for name, leaf in params["modules"].items() if name != "noise"}}


def test_the_objective_is_the_likelihood_and_the_weighted_divergence_in_nats_per_dimension(params, batch):
    params = plain(params)
    objective, parts, _ = trained(two_modules(), params, batch)
    nats, kl = by_hand(params, batch)
    np.testing.assert_allclose(parts["nats"], nats, rtol=1e-5)
    np.testing.assert_allclose(parts["forecast_kl_nats"], kl, rtol=1e-4)
    np.testing.assert_allclose(parts["bits_per_dim"], nats / 16 / np.log(2), rtol=1e-5)
    assert objective == pytest.approx((nats + 0.3 * kl).mean() / 16, rel=1e-5)
    assert (0.3 * kl).mean() > 0.01 * nats.mean()  # so that its absence would be seen


def test_the_likelihood_of_codes_is_a_rate(params, batch):
    codes = {"codes": batch["image"], "position": batch["position"]}
    parts = arm_stage.make(stage_config(modules=0), GRID, "codes").measure({"arm": params["arm"]}, {}, codes, KEY).parts
    nats = by_hand(plain(params), batch)[0]
    assert set(parts) == {"nats_per_code", "rate_bits_per_image"}
    np.testing.assert_allclose(parts["nats_per_code"], nats / 16, rtol=1e-5)
    np.testing.assert_allclose(parts["rate_bits_per_image"], nats / np.log(2), rtol=1e-5)


def test_modules_do_not_change_what_the_arm_learns_unless_asked_to(params, batch):
    params = plain(params)
    alone = trained(stage_config(modules=0), {"arm": params["arm"]}, batch)[2]["arm"]
    beside = trained(two_modules(), params, batch)[2]["arm"]
    through_h = trained(two_modules(gradient_to_arm=True), params, batch)[2]["arm"]
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), alone, beside)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, through_h)
    assert max(jax.tree.leaves(differences)) > 1e-3 * scale
    # The head knows the divergence through the ARM's distribution alone, which is a constant in any case.
    np.testing.assert_allclose(through_h["head"], alone["head"], atol=1e-6 * scale)


def test_the_posterior_noise_that_modules_see_teaches_the_arm_nothing(params, batch):
    """Not even where gradients pass through h: the noise is made of logits."""
    alone = trained(stage_config(modules=0), {"arm": params["arm"]}, batch)[2]["arm"]
    through_h = trained(two_modules(gradient_to_arm=True, inputs=("noise",)), params, batch)[2]["arm"]
    scale = np.abs(alone["head"]).max()
    np.testing.assert_allclose(through_h["head"], alone["head"], atol=1e-6 * scale)
    assert np.abs(through_h["trunk"] - alone["trunk"]).max() > 1e-3 * scale


def test_a_training_step_drops_features_by_each_examples_own_key_and_a_measurement_none(params, batch, monkeypatch):
    seen, hidden = [], pixelcnn.hidden
    monkeypatch.setattr(pixelcnn, "hidden", lambda *given: hidden(*given[:4]) if seen.append(given[4]) is None else ())
    model = arm_stage.make(stage_config(modules=0), GRID, "image")
    model.loss({"arm": params["arm"]}, {}, batch, KEY, jnp.int32(0))
    model.measure({"arm": params["arm"]}, {}, batch, KEY)
    expected = rng.per_example(rng.for_purpose(KEY, "dropout"), batch["position"])
    np.testing.assert_array_equal(jax.random.key_data(seen[0]), jax.random.key_data(expected))
    assert seen[1] is None


@pytest.mark.parametrize(
    ("posterior", "function"), [("exact", gumbel.posterior_noise), ("literal", gumbel.posterior_noise_literal)]
)
def test_modules_see_the_posterior_noise_that_the_config_names(params, batch, posterior, function):
    _, parts, _ = trained(two_modules(inputs=("noise",), posterior=posterior), params, batch)
    expected = by_hand(params, batch, function)[1]
    np.testing.assert_allclose(parts["forecast_kl_nats"], expected, rtol=1e-4)
    other = {"exact": gumbel.posterior_noise_literal, "literal": gumbel.posterior_noise}[posterior]
    assert np.abs(by_hand(params, batch, other)[1] - expected).min() > 1e-3 * expected.max()


def test_modules_of_a_mixture_of_logistics_are_refused():
    config = ArmStageConfig(
        NetworkConfig(resnets=1, filters=4, output="dmol"),
        OptimConfig("adam", 1e-3),
        TrainConfig(2, 1),
        ModulesConfig(),
    )
    with pytest.raises(InputError, match=r"arm\.forecast\.modules forecast categories"):
        arm_stage.make(config, GRID, "image")


def test_filters_and_sizes_that_do_not_fit_are_refused_with_the_key_to_change():
    with pytest.raises(InputError, match=r"arm\.forecast\.filters=5 is not divisible by the 3 channels"):
        config = ArmStageConfig(
            NetworkConfig(resnets=1, filters=6), OptimConfig("adam", 1e-3), TrainConfig(2, 1), ModulesConfig(filters=5)
        )
        arm_stage.make(config, Grid(4, 4, 3, 3), "image")
    with pytest.raises(InputError, match=r"halves 30x30 pixels .* set data\.image_size to such a number"):
        arm_stage.make(stage_config(modules=0), Grid(30, 30, 1, 3), "image")
