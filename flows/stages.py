"""The one stage of a run of a flow, and the figures of the whole."""

from typing import Any

from bitsperdim.model import Stage
from flows import stage
from flows.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (stage.stage(config),)


def report(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """The bound, of how many noise samples and of which noise it is, and how exactly the flow is inverted."""
    figures = measured["model"]
    reported = lambda name: "bits_per_dim" in name or name.startswith("round_trip")
    wanted = [name for name in figures if reported(name) and not name.endswith("_standard_error")]
    return {
        "dequantization": "uniform" if config.model.dequantization is None else "variational",
        "samples": config.evaluation.samples,
        **{name: figures[name] for name in wanted},
    }
