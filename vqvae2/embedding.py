"""Learned rows for small vocabularies (codes, classes), fetched by a one-hot product; and several numbers projected.

The gradient of a product is a product: it adds in a fixed order and partitions over devices, where that of a gather is
a scatter-add whose order on a GPU is not fixed.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitsperdim.distributions import level_to_value


class Embedding(nn.Module):
    """table[index], the table of shape [size, features] kept in float32."""

    size: int
    features: int
    dtype: jnp.dtype = jnp.float32
    table_init: Callable = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, index: Int[Array, "*shape"]) -> Float[Array, "*shape c"]:
        table = self.param("table", self.table_init, (self.size, self.features))
        return jax.nn.one_hot(index, self.size, dtype=self.dtype) @ table.astype(self.dtype)


class Projection(nn.Module):
    """The D channels of a cell, each a level of [-1, 1], as one linear map of their values; index -1 counts as zero."""

    levels: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, index: Int[Array, "*shape d"]) -> Float[Array, "*shape c"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (index.shape[-1], self.features))
        values = jnp.where(index < 0, 0.0, level_to_value(index, self.levels))
        return values.astype(self.dtype) @ kernel.astype(self.dtype)
