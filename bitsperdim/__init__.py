"""bitsperdim: likelihood-based image generative models in JAX/Flax. The shared core; each family is its own package."""
