"""Flows for images: MaCow and Glow, with uniform, variational and importance-weighted dequantization.

Source: Ma et al. 2019, MaCow: Masked Convolutional Generative Flow; Kingma & Dhariwal 2018, Glow.
"""

from flows.config import Config
from flows.importer import imported
from flows.sampling import load
from flows.stages import report, stages

__all__ = ["Config", "imported", "load", "report", "stages"]
