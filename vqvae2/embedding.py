"""Learned rows for small vocabularies (codes, classes), fetched by a one-hot product.

The gradient of a product is a product: it adds in a fixed order and partitions over devices, where that of a gather is
a scatter-add whose order on a GPU is not fixed.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
