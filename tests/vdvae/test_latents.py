"""The latents against normals written down otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vdvae import latents
from vdvae.config import ModelConfig

HIERARCHY = {name: (1,) for name in ("strides", "layers", "skips", "blocks", "widths", "bottlenecks", "kernels")}


@pytest.mark.parametrize("beta", [np.log(2.0), 0.4, 1.0])
def test_deviations_are_a_softplus_whose_logarithm_never_underflows(beta):
    u = np.array([-300.0, -40.0, -22.0, -20.0, -3.0, 0.0, 2.0, 60.0, 300.0])
    softplus = np.logaddexp(0.0, beta * u)
    found, slope = jax.vmap(jax.value_and_grad(lambda u: latents.log_softplus(u, beta)))(jnp.float32(u))
    np.testing.assert_allclose(found, np.log(softplus / beta), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, beta / (1.0 + np.exp(-beta * u)) / softplus, rtol=1e-5)
    if beta == np.log(2.0):
        assert latents.log_softplus(jnp.float32(0.0), beta) == pytest.approx(0.0, abs=1e-6)  # the deviation 1
    assert latents.log_softplus(jnp.float32(-1e4), beta) == pytest.approx(-1e4 * beta - np.log(beta), rel=1e-6)


@pytest.mark.parametrize("kind", ["std", "log_std"])
@pytest.mark.parametrize("residual", [False, True])
def test_ratio_divergence_and_draws_are_those_of_two_normals(kind, residual):
    beta, generator = 0.4, np.random.default_rng(0)
    latent = latents.make(
        ModelConfig(**HIERARCHY, latents=(1,), latent=kind, latent_beta=beta, residual_posterior=residual)
    )
    of_prior, of_posterior = 2.0 * generator.normal(size=(2, 2, 50))
    std = (lambda u: np.logaddexp(0.0, beta * u) / beta) if kind == "std" else (lambda u: np.exp(beta * u))
    p = scipy.stats.norm(of_prior[0], std(of_prior[1]))
    mean, deviation = of_posterior[0], std(of_posterior[1])
    # Relative to the prior: its mean is added, its deviation multiplied (NVAE).
    mean, deviation = (mean + p.mean(), deviation * p.std()) if residual else (mean, deviation)
    q = scipy.stats.norm(mean, deviation)
    prior = latent.prior(list(jnp.float32(of_prior)))
    posterior = latent.posterior(list(jnp.float32(of_posterior)), prior)

    z = q.mean() + q.std() * generator.normal(size=50)
    ratio = q.logpdf(z) - p.logpdf(z)
    np.testing.assert_allclose(latent.log_ratio(jnp.float32(z), posterior, prior), ratio, rtol=1e-3, atol=1e-4)
    # The logarithm of the ratio is a parabola, of which two nodes of Gauss and Hermite give the mean: +-1 deviation.
    sides = [q.mean() + side * q.std() for side in (-1.0, 1.0)]
    divergence = np.mean([q.logpdf(z) - p.logpdf(z) for z in sides], axis=0)
    np.testing.assert_allclose(latent.kl(posterior, prior), divergence, rtol=1e-4, atol=1e-5)
    noise = generator.normal(size=50)
    drawn = q.mean() + 0.7 * q.std() * noise
    np.testing.assert_allclose(latent.draw(posterior, noise, 0.7), drawn, rtol=1e-4, atol=1e-5)
