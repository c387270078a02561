"""The train state: one pytree that holds everything a run needs to go on.

step     int32, completed steps
params   float32 parameters
ema      their Polyak average: what is evaluated, sampled and extracted with
opt      the optimizer's state
extra    what a family keeps beside parameters (codebooks, BatchNorm moments)
skips    int32 counters of the skip rule (`step.py`)
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from bitsperdim import sharding
from bitsperdim.model import Model


def initial(model: Model, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> PyTree:
    """The state before the first step."""
    params, extra = model.init(key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        # A copy: the state is donated, and a buffer cannot be donated twice.
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer.init(params),
        "extra": extra,
        "skips": {name: jnp.zeros((), jnp.int32) for name in ("total", "in_a_row", "non_finite_in_a_row")},
    }


def abstract(
    model: Model, optimizer: optax.GradientTransformation, key: Key[Array, ""], mesh: Mesh, config: sharding.MeshConfig
) -> PyTree:
    """The state's shapes, types and places on `mesh`, without computing it."""
    shapes = jax.eval_shape(lambda: initial(model, optimizer, key))
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, shapes, sharding.for_state(shapes, config, mesh))


def create(model: Model, optimizer: optax.GradientTransformation, key: Key[Array, ""], like: PyTree) -> PyTree:
    """The initial state, each part computed where `like` (from `abstract`) places it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    # A program that runs once: XLA's CPU backend would spend some five times longer on making it fast.
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda: initial(model, optimizer, key), out_shardings=places, compiler_options=options)()


def num_params(state: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
