"""VQ-VAE-2: a hierarchical vector-quantised autoencoder and autoregressive priors over its codes.

Source: Razavi, van den Oord & Vinyals 2019, Generating Diverse High-Fidelity Images with VQ-VAE-2.
"""

from vqvae2.chain import load
from vqvae2.config import Config
from vqvae2.importer import imported
from vqvae2.run_plots import plots
from vqvae2.stages import report, stages

__all__ = ["Config", "imported", "load", "plots", "report", "stages"]
