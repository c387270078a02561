"""Optimisers against recorded trajectories, schedules against their formulas and end points."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitsperdim import optim
from bitsperdim.errors import InputError
from bitsperdim.optim import OptimConfig


def rates(config, steps, counts):
    """Learning rates in float64 at numbers of updates taken."""
    with jax.enable_x64(True):
        learning_rate = optim.schedule(config, steps)
        return np.array([learning_rate(count) for count in counts])


def trajectory(config, params, gradients):
    """Parameters after each update, for gradients given beforehand."""
    optimizer = optim.optimizer(config, steps=len(gradients))
    state = optimizer.init(params)
    after = []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


@pytest.fixture
def adamax_case(golden):
    """Ten Adamax steps of four tensors, recorded from PyTorch: start, gradients and parameters after each."""
    arrays = golden("vdvae/adamax_trajectory")
    tensors = lambda prefix: {f"layer_{i}": {"kernel": jnp.asarray(arrays[f"{prefix}/{i}"])} for i in range(4)}
    after = {tag: [tensors(f"{tag}/param_after/{s}") for s in range(1, 11)] for tag in ("wd0", "wd1e-2_L2")}
    return tensors("wd0/param0"), [tensors(f"wd0/grad/{s}") for s in range(10)], after


def test_adamax_follows_the_recorded_trajectory(adamax_case):
    start, gradients, after = adamax_case
    ours = trajectory(OptimConfig(name="adamax", learning_rate=1e-3), start, gradients)
    for got, expected in zip(ours, after["wd0"], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, expected)


def test_adamax_keeps_the_recorded_moments(adamax_case, golden):
    start, gradients, _ = adamax_case
    arrays = golden("vdvae/adamax_trajectory")
    config = OptimConfig(name="adamax", learning_rate=float(arrays["wd0/lr"]))
    assert (config.b1, config.b2, config.eps) == pytest.approx((*arrays["betas"], float(arrays["eps"])))
    optimizer = optim.optimizer(config, steps=10)
    state = optimizer.init(start)
    for gradient in gradients:
        _, state = optimizer.update(gradient, state, start)
    for ours, theirs in (("mu", "exp_avg_final"), ("nu", "exp_inf_final")):
        for i in range(4):
            found = optax.tree.get(state, ours)[f"layer_{i}"]["kernel"]
            np.testing.assert_allclose(found, arrays[f"wd0/{theirs}/{i}"], rtol=1e-6, atol=3e-8)


def test_adamax_decay_is_decoupled_from_the_moments(adamax_case):
    # The gradients are given, so with decoupled decay p' = p + (recorded step without decay) - lr wd p.
    start, gradients, after = adamax_case
    ours = trajectory(OptimConfig(name="adamax", learning_rate=1e-3, weight_decay=1e-2), start, gradients)
    before, expected = start, start
    for got, plain in zip(ours, after["wd0"], strict=True):
        expected = jax.tree.map(lambda e, p, b: e + (p - b) - 1e-3 * 1e-2 * e, expected, plain, before)
        before = plain
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
    coupled = after["wd1e-2_L2"][-1]
    gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours[-1], coupled)
    assert max(jax.tree.leaves(gap)) > 1e-5


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adam_is_the_formula_of_the_paper(eps):
    # Kingma & Ba 2015, Algorithm 1, in numpy; the large eps tells outside the root from inside.
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 3))
    p, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        p = p - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + eps)
    with jax.enable_x64(True):
        config = OptimConfig(name="adam", learning_rate=0.01, b1=0.8, b2=0.95, eps=eps)
        ours = trajectory(config, {"w": jnp.ones(3)}, [{"w": jnp.asarray(g)} for g in gradients])
        np.testing.assert_allclose(ours[-1]["w"], p, rtol=1e-12)


def test_l2_is_a_gradient_of_every_parameter_that_enters_the_moments():
    """A gradient of zero leaves l2 p alone, which Adam's first step turns into the learning rate whatever its size."""
    params = {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, -0.5)}
    zero = jax.tree.map(jnp.zeros_like, params)
    [after] = trajectory(OptimConfig(name="adam", learning_rate=0.1, l2=1e-2, eps=1e-12), params, [zero])
    np.testing.assert_allclose(after["kernel"], 2.9, rtol=1e-5)
    np.testing.assert_allclose(after["bias"], -0.4, rtol=1e-5)


def test_adamw_decays_kernels_alone():
    params = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    [after] = trajectory(OptimConfig(name="adamw", learning_rate=0.1, weight_decay=0.5), params, [zero])
    np.testing.assert_allclose(after["conv"]["kernel"], 0.95)
    np.testing.assert_array_equal(after["conv"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)


def test_decay_mask_can_spare_by_name():
    params = {"stem": {"kernel": jnp.ones(1)}, "body": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}
    mask = optim.decayed(params, r"^(?!.*(stem|bias))")
    assert mask == {"stem": {"kernel": False}, "body": {"kernel": True, "bias": False}}


def test_decay_mask_that_matches_nothing_is_refused():
    optimizer = optim.optimizer(OptimConfig("adamw", 1e-3, weight_decay=0.1, decay_mask="kernels"), steps=1)
    with pytest.raises(InputError, match="'kernels' matches no parameter"):
        optimizer.init({"kernel": jnp.ones(1)})


def test_sqrt_schedule_is_that_of_the_priors(golden):
    case = golden("vqvae2/lr_schedule")
    for c, by_width in zip(case["coefficient"], case["lr"], strict=True):
        for h, expected in zip(case["hidden_units"], by_width, strict=True):
            config = OptimConfig("adam", float(c), schedule="sqrt", warmup_steps=16_000, hidden_units=int(h))
            np.testing.assert_allclose(rates(config, 1_600_000, case["steps"] - 1), expected, rtol=1e-12)


def test_warm_up_rises_linearly_from_the_first_update():
    config = OptimConfig("adam", 0.4, warmup_steps=4)
    np.testing.assert_allclose(rates(config, 10, range(6)), [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-12)


def test_cosine_holds_then_falls_to_its_final_fraction_and_stays():
    # Efficient-VDVAE's shape at a hundredth of its length: warm-up 1, constant to 500, down over 7500.
    config = OptimConfig(
        "adamax", 1e-3, "cosine", warmup_steps=1, cosine_start=500, cosine_steps=7500, final_fraction=0.2
    )
    got = rates(config, 20_000, [0, 499, 500, 500 + 2500, 500 + 3750, 500 + 7500, 19_999])
    np.testing.assert_allclose(got, [1e-3, 1e-3, 1e-3, 8e-4, 6e-4, 2e-4, 2e-4], rtol=1e-12)


def test_cosine_without_a_horizon_ends_with_the_run():
    config = OptimConfig("adam", 1.0, "cosine", warmup_steps=10)
    assert rates(config, 110, [60])[0] == pytest.approx(0.5)
    assert rates(config, 110, [110])[0] == pytest.approx(0.0, abs=1e-12)


def test_exponential_takes_the_recorded_rates(golden):
    # MaCow: warm-up 3, then x 0.999997 an update.
    expected = golden("flows/f_adam5")["lrs"]
    config = OptimConfig("adam", 1e-3, "exponential", warmup_steps=3, exponential_rate=0.999997)
    np.testing.assert_allclose(rates(config, 5, range(5)), expected, rtol=1e-12)


def test_exponential_survives_float32():
    # MaCow stops at 1e-5, 1.535 million updates after the warm-up; 0.999997 rounded to float32 would give 1.03e-5.
    config = OptimConfig("adam", 1e-3, "exponential", exponential_rate=0.999997)
    got = jax.jit(optim.schedule(config, 2_000_000))(jnp.int32(1_535_000))
    np.testing.assert_allclose(got, 1e-3 * 0.999997**1_535_000, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        (OptimConfig("adam", 1.0), False),
        (OptimConfig("adam", 1.0, "exponential", exponential_rate=0.9), False),
        (OptimConfig("adam", 1.0, "sqrt", warmup_steps=5, hidden_units=4), False),
        (OptimConfig("adam", 1.0, "cosine", cosine_steps=20), False),
        (OptimConfig("adam", 1.0, "cosine"), True),
    ],
)
def test_depends_on_steps_says_whether_a_longer_run_differs(config, depends):
    counts = range(40)
    assert optim.depends_on_steps(config) is depends
    assert np.array_equal(rates(config, 50, counts), rates(config, 90, counts)) is not depends


def test_cosine_without_room_is_refused():
    with pytest.raises(InputError, match="starts at update 100, but the run has 100 steps"):
        optim.schedule(OptimConfig("adam", 1.0, "cosine", warmup_steps=100), steps=100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "sgd"}, "name must be one of adam, adamw, adamax, not 'sgd'"),
        ({"schedule": "linear"}, "schedule must be one of .*, not 'linear'"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and >= 0, not -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and >= 0, not nan"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, not -1"),
        ({"b2": 1.0}, r"b2 must lie in \[0, 1\), not 1.0"),
        ({"eps": 0.0}, "eps must be finite and > 0, not 0.0"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 for 'adam'"),
        ({"decay_mask": "("}, "decay_mask must be a regular expression, not '\\('"),
        ({"schedule": "sqrt", "hidden_units": 8}, "warmup_steps must be > 0 for the schedule 'sqrt', not 0"),
        ({"schedule": "sqrt", "warmup_steps": 8}, "hidden_units must be > 0 for the schedule 'sqrt', not 0"),
        ({"exponential_rate": 1.5}, r"exponential_rate must lie in \(0, 1\], not 1.5"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{"name": "adam", "learning_rate": 1e-3, **values})


def test_polyak_is_the_rule_of_the_papers(golden):
    case = golden("vqvae2/polyak_ema")
    with jax.enable_x64(True):
        ema = {"w": jnp.asarray(case["ema_init"])}
        for t, expected in enumerate(case["ema"], start=1):
            ema = optim.polyak(ema, {"w": jnp.asarray(case["params"][t])}, float(case["decay"]), t - 1, ramp=False)
            np.testing.assert_allclose(ema["w"], expected, rtol=1e-12)


@pytest.mark.parametrize("step", [0, 90, 1_000_000])
def test_polyak_ramp_forgets_the_start_quickly(step):
    ema = jax.jit(lambda t: optim.polyak(jnp.ones(()), jnp.zeros(()), 0.9999, t, ramp=True))(step)
    np.testing.assert_allclose(ema, min(0.9999, (1 + step) / (10 + step)), rtol=1e-6)


def test_polyak_stays_where_it_has_arrived():
    w = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(optim.polyak(w, w, 0.9999, 5, ramp=True), w)


def test_polyak_keeps_its_own_precision():
    ema = optim.polyak(jnp.ones((), jnp.float32), jnp.zeros((), jnp.bfloat16), 0.9999, 0, ramp=False)
    assert ema.dtype == jnp.float32
    np.testing.assert_allclose(ema, 0.9999, rtol=1e-6)
