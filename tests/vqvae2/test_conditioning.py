"""The conditioning stack against its golden vectors: BatchNorm in evaluation, in training, and its running moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.batch_norm import update_running
from vqvae2.conditioning import ConditioningStack

# The golden names of the runs of blocks.
RUNS = {"before_0": "d1", "before_1": "d2", "lowest": "mid", "after_1": "u2", "after_0": "u1"}
GOLDEN = ConditioningStack(4, (8, 12, 12), (4, 6, 6), norm="batch")


@pytest.fixture
def data(golden):
    return golden("vqvae2/conditioning_stack")


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def blocks():
    """(our name, golden name) of every residual block; four at the lowest resolution, two elsewhere."""
    return [(f"{ours}_{i}", f"{RUNS[ours]}.{i}") for ours in RUNS for i in range(4 if ours == "lowest" else 2)]


def golden_variables(data):
    def conv(name):
        return {"kernel": data[f"param/{name}.weight"].transpose(2, 3, 1, 0), "bias": data[f"param/{name}.bias"]}

    def transposed(name):
        kernel = data[f"param/{name}.weight"].transpose(2, 3, 0, 1)[::-1, ::-1]
        return {"kernel": kernel, "bias": data[f"param/{name}.bias"]}

    params = {"input": conv("inp"), "down_0": conv("down1"), "down_1": conv("down2")}
    params |= {"up_0": transposed("up1"), "up_1": transposed("up2")}
    for ours, theirs in blocks():
        norm = {"scale": data[f"param/{theirs}.bn.weight"], "bias": data[f"param/{theirs}.bn.bias"]}
        params[ours] = {"norm": norm, "reduce": conv(f"{theirs}.c1"), "conv": conv(f"{theirs}.c2")}
        params[ours]["expand"] = conv(f"{theirs}.c3")
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": running(data, "param")})


def running(data, where):
    names = {"mean": "running_mean", "var": "running_var"}
    return {
        ours: {"norm": {moment: data[f"{where}/{theirs}.bn.{name}"] for moment, name in names.items()}}
        for ours, theirs in blocks()
    }


def test_golden_output_under_running_moments(data):
    output = GOLDEN.apply(golden_variables(data), nhwc(data["input"]))
    np.testing.assert_allclose(output, nhwc(data["output_eval"]), atol=1e-5)


def test_golden_output_and_running_moments_of_a_training_pass(data):
    variables = golden_variables(data)
    output, left = GOLDEN.apply(variables, nhwc(data["input"]), train=True, mutable=["batch_moments"])
    np.testing.assert_allclose(output, nhwc(data["output_train"]), atol=1e-5)
    after = update_running(variables["batch_stats"], left["batch_moments"], num_batches=1)
    compare = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    jax.tree.map(compare, after, running(data, "after_train"))


def test_running_moments_average_over_micro_batches():
    moments = [{"mean": jnp.array([2.0]), "var": jnp.array([4.0])}, {"mean": jnp.array([4.0]), "var": jnp.array([2.0])}]
    summed = jax.tree.map(jnp.add, *moments)
    after = update_running({"mean": jnp.array([1.0]), "var": jnp.array([1.0])}, summed, num_batches=2, momentum=0.75)
    np.testing.assert_allclose(after["mean"], 0.75 * 1.0 + 0.25 * 3.0)
    np.testing.assert_allclose(after["var"], 0.75 * 1.0 + 0.25 * 3.0)


def test_group_normalisation_leaves_no_state_and_no_trace_of_the_batch(random_variables):
    stack = ConditioningStack(2, (8, 12), (4, 6))
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 5))
    variables = random_variables(stack, x)
    assert set(variables) == {"params"}
    apply = jax.jit(stack.apply)
    np.testing.assert_allclose(apply(variables, x)[1], apply(variables, x.at[::2].add(3.0))[1], atol=1e-5)


def test_a_grid_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="6 x 6 cannot be halved 2 times"):
        ConditioningStack(2, (8, 8, 8), (4, 4, 4)).init(jax.random.key(0), jnp.zeros((1, 6, 6, 5)))
