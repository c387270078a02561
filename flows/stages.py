"""The one stage of a run of a flow, and the figures of the whole."""

from typing import Any

from bitsperdim.model import Stage
from flows import stage
from flows.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (stage.stage(config),)


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The bound, and what kind of bound it is: of how many noise samples, of which noise."""
    figures = measured["model"]
    wanted = [name for name in figures if "bits_per_dim" in name and not name.endswith("_standard_error")]
    return {
        "dequantization": "uniform" if config.model.dequantization is None else "variational",
        "samples": config.evaluation.samples,
        **{name: figures[name] for name in wanted},
    }
