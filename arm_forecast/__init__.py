"""Autoregressive image models of the PixelCNN++ kind, and exact fast sampling from them by forecasting.

Source: Wiggers & Hoogeboom 2020, Predictive Sampling with Forecasting Autoregressive Models (ICML, PMLR 119).
"""

from arm_forecast.config import Config
from arm_forecast.importer import imported
from arm_forecast.sampling import load
from arm_forecast.stages import report, stages

__all__ = ["Config", "imported", "load", "report", "stages"]
