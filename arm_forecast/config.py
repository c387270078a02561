"""What a config of an autoregressive model may say: one frozen dataclass for each section, every key checked by name.

Defaults are those of the paper's supplement (Table 1) where it gives a value. Not here: the published experiments
(`configs/`), and the section of the network itself (`pixelcnn.NetworkConfig`).
"""

import dataclasses
import re

from arm_forecast.pixelcnn import NetworkConfig
from bitsperdim.config import at_least, one_of
from bitsperdim.data import DataConfig
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig

INPUTS = ("x", "noise")
# The second uses the modules also where the fixed point has the better record.
LEARNED = ("modules", "modules_without_fallback")
# Ways to draw whose guesses are verified by the network, in all rows or in a window of them (`samplers.py`).
FORECASTS = (
    "ancestral",
    "zeros",
    "last",
    "fixed_point",
    "fixed_point_without_noise",
    "fixed_point_fresh_noise",
    *LEARNED,
)


@dataclasses.dataclass(frozen=True)
class ModulesConfig:
    """The forecasting modules (`modules.py`): small networks that guess the next pixels from the ARM's activation."""

    modules: int = 1  # T: module t forecasts the pixel t places ahead; 0: no modules
    filters: int = 162  # of the strictly triangular 3x3 convolution; a multiple of the channels
    weight: float = 0.01  # of the Kullback-Leibler divergence beside the likelihood
    inputs: tuple[str, ...] = ()  # beside h: 'x' (one-hot), 'noise' (posterior Gumbel noise)
    posterior: str = "exact"  # of the noise; 'literal': the supplement's eq. 3 as printed, which is biased
    gradient_to_arm: bool = False  # let the divergence train the ARM through h; its distribution is always a constant

    def __post_init__(self) -> None:
        at_least(self, 0, "modules", "weight")
        at_least(self, 1, "filters")
        if len(set(self.inputs)) != len(self.inputs) or not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"inputs must be some of {INPUTS}, not {self.inputs}")
        one_of(self, posterior=("exact", "literal"))


@dataclasses.dataclass(frozen=True)
class ArmStageConfig:
    """The ARM, and the modules that are trained with it."""

    model: NetworkConfig
    optim: OptimConfig
    train: TrainConfig
    forecast: ModulesConfig = dataclasses.field(default_factory=lambda: ModulesConfig(modules=0))


@dataclasses.dataclass(frozen=True)
class ModulesStageConfig:
    """Modules trained afterwards, on a frozen ARM, with pairs (x, noise) drawn by the exact sampler."""

    model: ModulesConfig
    optim: OptimConfig
    train: TrainConfig
    pairs: int = 50_000  # samples drawn for training; a tenth more for evaluation

    def __post_init__(self) -> None:
        at_least(self, 10, "pairs")
        if not self.model.modules:
            raise ValueError("model.modules must be at least 1, not 0")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The discrete autoencoder under a latent ARM (`autoencoder.py`)."""

    width: int = 512
    latent_channels: int = 4
    categories: int = 128

    def __post_init__(self) -> None:
        at_least(self, 1, "latent_channels")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even, not {self.width}")
        if not 2 <= self.categories <= 256:
            raise ValueError(f"categories must lie in 2..256, not {self.categories}")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """The stages before a latent ARM: the autoencoder, and the extraction of its codes."""

    model: AutoencoderConfig
    optim: OptimConfig
    train: TrainConfig
    codes_batch_size: int = 128

    def __post_init__(self) -> None:
        at_least(self, 1, "codes_batch_size")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How `sample.py` draws where its flags do not say."""

    sampler: str = "auto"  # the fastest for the batch, from the run's samplers.json or the built-in rule
    batch_size: int = 32  # images drawn at once on all devices together

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        # Which windows fit is known with the images.
        if not re.fullmatch(rf"auto|cached|({'|'.join(FORECASTS)})(:\d+)?", self.sampler):
            names = f"auto, cached, {', '.join(FORECASTS)} (all but the first two also as NAME:ROWS)"
            raise ValueError(f"sampler must be one of {names}, not '{self.sampler}'")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of an autoregressive model: `family` is 'arm_forecast'.

    Stages: `arm`; with `autoencoder` the three stages `autoencoder`, `codes`, `arm`; with `modules` two more at the
    end, `pairs` and `modules`.
    """

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    arm: ArmStageConfig
    autoencoder: LatentConfig | None = None
    modules: ModulesStageConfig | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
