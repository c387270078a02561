"""What a config of a flow may say: one frozen dataclass for each section, every key checked by name.

Not here: the published experiments (`configs/`).
"""

import dataclasses
import math

from bitsperdim.config import at_least, one_of
from bitsperdim.data import DataConfig
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig
from flows.masked_conv import INVERSES


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """A multi-scale flow. `steps` names the steps of each level, the one at full resolution first.

    MaCow: ((4,), (12, 12), (12, 12), (12,)): 4 steps on the image itself, two levels that split off twice, each time a
    share of 1 / `factor` of the level's channels, and the top. Glow: ((32,), (32,), (32,)), squeezed before each level,
    half of the channels split off after each but the top.
    """

    steps: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]  # hidden channels in the couplings of each level
    kind: str = "macow"  # or 'glow'
    factor: int = 4  # the first split of a level takes 1 / factor of its channels; 2 for 'glow'
    kernel: tuple[int, int] = (2, 3)  # of the masked convolutions: lines, across
    affine: bool = True  # False: additive steps, without scales
    prior_affine: bool = True  # of the couplings before a split
    memory: str = (
        "plain"  # what gradients keep of a step: 'plain' all, 'remat' its input, 'reversible' ('glow') nothing
    )

    def __post_init__(self) -> None:
        one_of(self, kind=("macow", "glow"), memory=("plain", "remat", "reversible"))
        if len(self.steps) < 1 or any(len(level) < 1 or min(level) < 1 for level in self.steps):
            raise ValueError(f"steps must name one or more numbers of steps for each level, not {self.steps}")
        if len(self.widths) != len(self.steps) or min(self.widths) < 1:
            raise ValueError(
                f"widths must be {len(self.steps)} positive numbers, one for each level, not {self.widths}"
            )
        ends = {len(self.steps) - 1} | ({0} if self.kind == "macow" else set())
        for i, level in enumerate(self.steps):
            most = 1 if i in ends else self.factor - 1
            if len(level) > most:
                raise ValueError(f"steps must have at most {most} number(s) in level {i}, not {level}")
        if self.kind == "glow" and self.factor != 2:
            raise ValueError(f"factor must be 2 for 'glow', not {self.factor}")
        at_least(self, 2, "factor")
        if min(self.kernel) < 1 or self.kernel[1] % 2 == 0:
            raise ValueError(f"kernel must be (lines, across) with across odd, not {self.kernel}")
        if self.memory == "reversible" and self.kind == "macow":
            raise ValueError("memory must be 'plain' or 'remat' for 'macow', whose inverse is slow, not 'reversible'")

    @property
    def num_halvings(self) -> int:
        """How often height and width must be divisible by 2."""
        return len(self.steps) - (self.kind == "macow")


@dataclasses.dataclass(frozen=True)
class DequantizationConfig:
    """Learned noise: a flow from Gaussian noise to u, conditioned on the image (`dequantization.py`)."""

    flow: FlowConfig
    condition_channels: int = 4  # features of the encoder for each pixel

    def __post_init__(self) -> None:
        at_least(self, 1, "condition_channels")
        if self.flow.kind != "macow":
            raise ValueError(f"flow.kind must be 'macow', not '{self.flow.kind}'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The flow, its noise, and the bound that is trained and measured."""

    flow: FlowConfig
    dequantization: DequantizationConfig | None = None  # None: uniform noise
    # Uniform noise lies in [0, noise_width) of a level. Below 1 for teaching alone: the bound holds for any width, but
    # the density it is made of grows without end as the width goes to 0 (`lesson.py`).
    noise_width: float = 1.0
    range: str = "symmetric"  # of the flow's input: [-1, 1), or 'unit': [0, 1)
    samples: int = 1  # K of the training objective, all of them through the flow
    alpha: float = 1.0  # order of the Renyi bound: 1 the evidence lower bound, 0 the importance-weighted one
    measured_samples: int = 8  # K of the importance-weighted figure while training
    chunk: int = 8  # samples of an image that are in memory at once
    init_images: int = 512  # of the data-dependent start
    flip: bool = False  # mirror training images with probability 1/2
    shift: int = 0  # move training images by up to so many pixels, their border mirrored
    scan: bool = True  # like steps in one loop of the compiled program; False: unrolled, slow to compile
    inverse: str = "auto"  # of masked convolutions: 'lines', 'fixed_point'; 'auto': lines on CPUs

    def __post_init__(self) -> None:
        one_of(self, range=("symmetric", "unit"), inverse=("auto", *INVERSES))
        at_least(self, 1, "samples", "measured_samples", "chunk", "init_images")
        at_least(self, 0, "shift")
        if not 0.0 < self.noise_width <= 1.0 or (self.dequantization is not None and self.noise_width != 1.0):
            raise ValueError(f"noise_width must lie in (0, 1], and be 1 with learned noise, not {self.noise_width}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, not {self.alpha}")
        for key in ("samples", "measured_samples"):
            if getattr(self, key) > self.chunk and getattr(self, key) % self.chunk:
                raise ValueError(
                    f"{key} must be a multiple of chunk={self.chunk}, or smaller, not {getattr(self, key)}"
                )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What evaluate.py measures beside the bound."""

    samples: int = 512  # K of the importance-weighted figure

    def __post_init__(self) -> None:
        at_least(self, 1, "samples")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How `sample.py` draws where its flags do not say."""

    temperature: float = 1.0  # multiplies all latents
    batch_size: int = 64  # images drawn at once

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature")
        at_least(self, 1, "batch_size")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of a flow: `family` is 'flows'. One stage, `model`."""

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        most = self.evaluation.samples
        if most > self.model.chunk and most % self.model.chunk:
            raise ValueError(
                f"evaluation.samples must be a multiple of model.chunk={self.model.chunk}, or smaller, not {most}"
            )
