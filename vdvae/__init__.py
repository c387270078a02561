"""Very deep hierarchical VAEs: Efficient-VDVAE and its baseline, VDVAE.

Source: Hazami, Mama & Thurairatnam 2022, Efficient-VDVAE: Less is more; Child 2021, Very Deep VAEs Generalize
Autoregressive Models and Can Outperform Them on Images.
"""

from vdvae.config import Config
from vdvae.importer import imported
from vdvae.run_plots import plots
from vdvae.sampling import load
from vdvae.stages import report, stages

__all__ = ["Config", "imported", "load", "plots", "report", "stages"]
