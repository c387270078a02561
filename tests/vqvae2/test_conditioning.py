"""The conditioning stack against its golden vectors: BatchNorm in evaluation, in training, and its running moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitsperdim.batch_norm import update_running
from vqvae2.conditioning import Conditioner, ConditioningStack
from vqvae2.runs import Manner

# The golden names of the runs of blocks.
RUNS = {"before_0": "d1", "before_1": "d2", "lowest": "mid", "after_1": "u2", "after_0": "u1"}
MANNERS = [Manner(scan, remat) for scan in (False, True) for remat in (False, True)]
GOLDEN = ConditioningStack(4, (8, 12, 12), (4, 6, 6), norm="batch")


@pytest.fixture
def data(golden):
    return golden("vqvae2/conditioning_stack")


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def stacked(of_block):
    """What `of_block(golden name)` gives for each block, by our name of its run, those of a run in one array.

    Four blocks at the lowest resolution, two elsewhere.
    """
    names = {ours: [f"{theirs}.{i}" for i in range(4 if ours == "lowest" else 2)] for ours, theirs in RUNS.items()}
    return {ours: jax.tree.map(lambda *leaves: np.stack(leaves), *map(of_block, names[ours])) for ours in names}


def golden_variables(data):
    def conv(name):
        return {"kernel": data[f"param/{name}.weight"].transpose(2, 3, 1, 0), "bias": data[f"param/{name}.bias"]}

    def transposed(name):
        kernel = data[f"param/{name}.weight"].transpose(2, 3, 0, 1)[::-1, ::-1]
        return {"kernel": kernel, "bias": data[f"param/{name}.bias"]}

    params = {"input": conv("inp"), "down_0": conv("down1"), "down_1": conv("down2")}
    params |= {"up_0": transposed("up1"), "up_1": transposed("up2")}

    def block(name):
        norm = {"scale": data[f"param/{name}.bn.weight"], "bias": data[f"param/{name}.bn.bias"]}
        return {"norm": norm, "reduce": conv(f"{name}.c1"), "conv": conv(f"{name}.c2"), "expand": conv(f"{name}.c3")}

    params |= stacked(block)
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": running(data, "param")})


def running(data, where):
    moments = lambda name: {
        "mean": data[f"{where}/{name}.bn.running_mean"],
        "var": data[f"{where}/{name}.bn.running_var"],
    }
    return stacked(lambda name: {"norm": moments(name)})


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_golden_output_under_running_moments(data, manner):
    output = GOLDEN.clone(manner=manner).apply(golden_variables(data), nhwc(data["input"]))
    np.testing.assert_allclose(output, nhwc(data["output_eval"]), atol=1e-5)


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_golden_output_and_running_moments_of_a_training_pass(data, manner):
    variables = golden_variables(data)
    output, left = GOLDEN.clone(manner=manner).apply(
        variables, nhwc(data["input"]), train=True, mutable=["batch_moments"]
    )
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


def test_a_coarser_code_stands_over_its_own_cells_and_no_others(random_variables):
    """One of four top codes over a grid of 8x8: its quarter, and what a 3x3 convolution reaches of it."""
    conditioner = Conditioner(6, 4, ConditioningStack(1, (8,), (4,), "none"), octaves=0)
    top, middle = jnp.zeros((1, 2, 2), int), jnp.zeros((1, 8, 8), int)
    variables = random_variables(conditioner, (top, middle))
    apply = jax.jit(lambda top: conditioner.apply(variables, (top, middle)))
    effect = np.abs(apply(top.at[0, 1, 0].set(3)) - apply(top))[0].max(-1)
    quarter, reach = np.zeros((2, 8, 8), bool)
    quarter[4:, :4], reach[3:, :5] = True, True
    assert (effect[quarter] > 0).all() and not effect[~reach].any()


def test_a_grid_of_odd_size_is_the_corner_of_a_larger_one(random_variables):
    """Where 3x3 kernels see their own cell alone, so that edges do not matter."""
    stack, x = ConditioningStack(2, (8, 12, 12), (4, 6, 6), "none"), jax.random.normal(jax.random.key(0), (1, 8, 8, 5))
    centre = np.pad(np.ones((1, 1)), 1)[..., None, None]
    variables = random_variables(stack, x)
    variables = jax.tree.map(lambda leaf: leaf * centre if leaf.shape[-4:-2] == (3, 3) else leaf, variables)
    whole = stack.apply(variables, x)
    for height, width in ((5, 3), (6, 7)):
        corner = stack.apply(variables, x[:, :height, :width])
        np.testing.assert_allclose(corner, whole[:, :height, :width], atol=1e-5)
