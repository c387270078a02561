"""Parameters for small networks, drawn without compiling their initialisation."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_variables():
    """`random_variables(module, *inputs, **named)`: what `module.init` would make, but nothing zero and nothing small.

    So no residual branch hides behind its initial scale. Deviations are 1 / sqrt(fan in).
    """

    def draw(module, *inputs, **named):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))
        generator = np.random.default_rng(0)
        scale = lambda leaf: max(np.prod(leaf.shape[:-1]), 1) ** -0.5
        normal = lambda leaf: (scale(leaf) * generator.standard_normal(leaf.shape)).astype(np.float32)
        return jax.tree.map(normal, shapes)

    return draw
