"""Arithmetic and traffic of programs that are small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bitsperdim import program, sharding
from bitsperdim.sharding import MeshConfig

ROUNDS, WIDTH, ROWS = 5, 64, 16


def layers(weights, x):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def count(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program.flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_loop_counts_as_often_as_it_runs():
    once = 2 * ROWS * WIDTH * WIDTH
    shapes = (ROUNDS, WIDTH, WIDTH), (ROWS, WIDTH)
    assert count(layers, *shapes) == ROUNDS * once
    # Backward: a product for the weights and one for the inputs.
    assert count(jax.grad(lambda weights, x: layers(weights, x).sum()), *shapes) == 3 * ROUNDS * once


def test_products_read_their_operands_and_write_their_result():
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROUNDS, WIDTH, WIDTH), (ROWS, WIDTH))]
    once = 2 * (WIDTH * WIDTH + 2 * ROWS * WIDTH)
    assert program.product_bytes(jax.make_jaxpr(layers)(*arguments).jaxpr) == ROUNDS * once


def test_activations_that_are_computed_again_count_again():
    again = jax.checkpoint(lambda x, weight: jnp.tanh(x @ weight) @ weight)
    loss = lambda x, weight: again(x, weight).sum()
    plain = count(loss, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert count(jax.grad(loss, (0, 1)), (ROWS, WIDTH), (WIDTH, WIDTH)) == 3.5 * plain  # the last product is not needed


@pytest.mark.parametrize(("strides", "groups", "edge"), [((1, 1), 1, 6), ((2, 2), 1, 3), ((1, 1), 4, 6)])
def test_convolutions(strides, groups, edge):
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, strides, [(1, 1), (1, 1)], dimension_numbers=layout, feature_group_count=groups
    )
    shapes = (2, 6, 6, 8), (3, 3, 8 // groups, 12)
    forward = 2 * (2 * edge * edge * 12) * (3 * 3 * 8 // groups)
    assert count(convolve, *shapes) == forward
    # The gradient of the inputs: strides put zeros between dL/dy, and they are no work.
    assert count(jax.grad(lambda x, kernel: convolve(x, kernel).sum()), *shapes) == pytest.approx(2 * forward, rel=0.3)


def test_a_branch_counts_as_the_dearest_one():
    dear, cheap = lambda x: x @ x @ x, lambda x: x @ x
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, dear, cheap, x), (8, 8)) == 2 * 2 * 8**3


def test_traffic_of_sharded_weights_in_a_loop():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    weights = jax.ShapeDtypeStruct((ROUNDS, WIDTH, WIDTH), jnp.float32, sharding=place(None, None, "fsdp"))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=sharding.over_batch(mesh))

    def step(weights, x):
        value, gradient = jax.value_and_grad(lambda weights: (layers(weights, x) ** 2).mean())(weights)
        return weights - gradient, value

    compiled = jax.jit(step, out_shardings=(weights.sharding, place())).lower(weights, x).compile()
    found = program.collectives(compiled.as_text())
    kernel = 4 * WIDTH * WIDTH
    gathered = [one for one in found if one.kind == "all-gather"]
    assert {(one.bytes, one.times) for one in gathered} == {(kernel, ROUNDS)}
    assert len(gathered) == 2  # forward and backward
    assert (4, 1) in {(one.bytes, one.times) for one in found if one.kind == "all-reduce"}  # the loss
    assert any("dot_general" in one.source for one in gathered)
    total = program.traffic(compiled.as_text())
    assert total["all-gather"] == {"bytes": 2 * ROUNDS * kernel, "count": 2 * ROUNDS}
    assert set(total) == {one.kind for one in found}
    assert (WIDTH, WIDTH) in {shape for one in gathered for shape in one.shapes}


def test_no_traffic_on_one_device():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    assert program.traffic(compiled.as_text()) == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [("f32[8,128]{1,0}", 4096), ("bf16[3]", 6), ("pred[5]{0}", 5), ("(s32[], f32[2,2]{1,0}, u8[7])", 4 + 16 + 7)],
)
def test_sizes_of_types(text, size):
    assert program._num_bytes(text) == size
