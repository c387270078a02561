"""Batch normalisation whose running moments the train step keeps in `extra`.

Source: Ioffe & Szegedy 2015, algorithms 1 and 2. Not flax's own, which changes its state inside the forward pass: here
a forward pass reports its moments, and they are folded in once a step, whatever the number of micro-batches.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class BatchNorm(nn.Module):
    """y = scale (x - mean) / sqrt(var + 1e-5) + bias, over batch, rows and columns; nothing here changes the state.

    Running moments are read from the collection `batch_stats`. In training the batch's own moments are used instead and
    left in the collection `batch_moments` (variance unbiased), for `update_running`. Under `jit` they are those of the
    batch over all devices. Each micro-batch of `accumulation` is normalised by its own, which is another function than
    that of the whole batch: its moments are not known before the last micro-batch has passed. The loop warns of it.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        features = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            count = math.prod(x.shape[:-1])
            replace = {"reduce_fn": lambda _, new: new, "init_fn": lambda: None}
            self.sow("batch_moments", "mean", jax.lax.stop_gradient(mean), **replace)
            self.sow("batch_moments", "var", jax.lax.stop_gradient(var) * count / max(count - 1, 1), **replace)
        return ((x - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias).astype(self.dtype)


def update_running(
    batch_stats: PyTree, summed_moments: PyTree, num_batches: Float[Array, ""] | int, momentum: float = 0.9
) -> PyTree:
    """running <- momentum running + (1 - momentum) moments, their mean over the `num_batches` micro-batches of a step.

    `summed_moments` is the collection `batch_moments`, added up over micro-batches.
    """
    return jax.tree.map(
        lambda running, total: momentum * running + (1.0 - momentum) * total / num_batches, batch_stats, summed_moments
    )
