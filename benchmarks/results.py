"""RESULTS.md: figures of evaluated runs, with commands, hardware, what is published, and why the two differ.

    python evaluate.py --workdir=RUN                      # of each run, first
    python -m benchmarks results RUN RUN ... > RESULTS.md

Nothing is measured here. Figures are those of the runs' evaluation.json, hardware that of environment.json; commands
are found by comparing a run's config with all configs; parameters and images seen of a published setting are counted
from its config. REFERENCES holds the published figures, which the docstrings of the configs name too.
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from benchmarks import record
from bitsperdim import catalogue, config_files, evaluation, metrics, plan, sharding, trained
from bitsperdim import config as config_lib
from bitsperdim import run as run_lib
from bitsperdim import state as state_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Stage
from bitsperdim.run import Run

COMMAND = "python -m benchmarks results"


class Reference(NamedTuple):
    """A published figure: of which of our configs it is, under which name we measure it, and whose it is."""

    configs: str  # a pattern of NAME:VARIANT of the runs that are compared with it
    setting: str  # the config whose settings are the published ones
    figure: str
    value: float
    unit: str
    source: str
    remark: str = ""


MACOW = "Ma et al. 2019, after 1.5 M updates"
EFFICIENT = "Hazami et al. 2022, on one half of the test set"
RAZAVI = "Razavi et al. 2019, on a TPU pod"
# The first whose pattern fits counts, for each figure.
REFERENCES = (
    Reference(
        *("arm_binary_mnist.*", "arm_binary_mnist", "nats", 81.3, "nats", "PixelCNN, van den Oord et al. 2016"),
        "The published network is another one, the first PixelCNN; the settings compared here are those of Wiggers & "
        "Hoogeboom 2020, who give no likelihood.",
    ),
    Reference("arm_cifar10:dmol.*", "arm_cifar10:dmol", "bits_per_dim", 2.92, "bits/dim", "Salimans et al. 2017"),
    Reference("flows_cifar10:.*glow.*", "flows_cifar10:glow", "bits_per_dim", 3.35, "bits/dim", f"Glow in {MACOW}"),
    Reference("flows_cifar10:.*variational.*", "flows_cifar10:variational", "bits_per_dim", 3.16, "bits/dim", MACOW),
    Reference("flows_cifar10.*", "flows_cifar10", "bits_per_dim", 3.28, "bits/dim", MACOW),
    Reference("flows_imagenet64:glow", "flows_imagenet64:glow", "bits_per_dim", 3.81, "bits/dim", f"Glow in {MACOW}"),
    Reference("flows_imagenet64:vari.*", "flows_imagenet64:variational", "bits_per_dim", 3.69, "bits/dim", MACOW),
    Reference("flows_imagenet64.*", "flows_imagenet64", "bits_per_dim", 3.75, "bits/dim", MACOW),
    Reference(
        *("vdvae_binary_mnist.*", "vdvae_binary_mnist:released", "nats", 79.09, "nats", EFFICIENT),
        "Which half of the test set is not known.",
    ),
    Reference("vdvae_cifar10:vdvae", "vdvae_cifar10:vdvae", "bits_per_dim", 2.87, "bits/dim", "Child 2021"),
    Reference("vdvae_cifar10:c1", "vdvae_cifar10:c1", "bits_per_dim", 2.91, "bits/dim", EFFICIENT),
    # At 5 bits there is no published figure of CIFAR-10.
    *(
        Reference(pattern, "vdvae_cifar10:released", "bits_per_dim", 2.87, "bits/dim", EFFICIENT)
        for pattern in ("vdvae_cifar10:(?!.*5bit).*", "vdvae_cifar10")
    ),
    Reference("vdvae_imagenet32.*", "vdvae_imagenet32:released", "bits_per_dim", 3.58, "bits/dim", EFFICIENT),
    Reference("vdvae_imagenet64.*", "vdvae_imagenet64:released", "bits_per_dim", 3.30, "bits/dim", EFFICIENT),
    Reference("vdvae_celeba64.*", "vdvae_celeba64:released", "bits_per_dim", 1.83, "bits/dim", EFFICIENT),
    Reference("vqvae2_imagenet.*", "vqvae2_imagenet", "mse", 0.0050, "", RAZAVI),
    Reference("vqvae2_imagenet.*", "vqvae2_imagenet", "nats_per_code_top", 3.41, "nats", RAZAVI),
    Reference("vqvae2_imagenet.*", "vqvae2_imagenet", "nats_per_code_bottom", 3.45, "nats", RAZAVI),
)
# Which figures of a run are results, and what each of them is; in this order.
ESTIMATES = {"arm_forecast": "exact", "flows": "bound, 1 noise sample", "vdvae": "bound, 1 sample of the latents"}
KINDS = (
    (r"nats", "nats an image", None),
    (r"bits_per_dim", "bits/dim", None),
    (r"(?:bits_per_dim|nats)_importance_weighted_(\d+)", None, "importance-weighted bound, {0} samples"),
    (r"bits_per_dim_bound", "bits/dim", "bound: codes and pixels given the codes"),
    (r"nats_per_code_(\w+)", "nats a code", "exact, prior of the {0} codes"),
    (r"rate_bits_per_image", "bits an image", "exact, of all codes: a rate, no likelihood of the image"),
    (r"mse", "MSE in [-1, 1)", "mean of the reconstructions"),
    (r"mse_over_variance", "MSE over the variance", "mean of the reconstructions"),
    (r"ssim", "SSIM", "mean of the reconstructions"),
)


class Row(NamedTuple):
    """A figure of a run, with its standard error where it is known."""

    figure: str
    value: float
    error: float | None
    unit: str
    kind: str


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of evaluated runs, or of published ones")
    arguments = parser.parse_args()
    for line in report(arguments.runs):
        print(line)


def report(workdirs: Sequence[str]) -> Iterator[str]:
    """The lines of RESULTS.md. Raises InputError for a folder that is no run, or not evaluated."""
    runs = [(workdir, run_lib.open_run(workdir)) for workdir in workdirs]
    measured = {workdir: evaluated(run) for workdir, run in runs}
    yield "# Results"
    yield ""
    yield "Generated, not written: each figure is one that this code has measured, from the `evaluation.json` of a run."
    yield "Published figures stand beside them for comparison; none of those is ours. The command:"
    yield ""
    yield "```bash"
    yield " ".join([COMMAND, *workdirs, "> RESULTS.md"])
    yield "```"
    yield ""
    yield "Folders in `published/` lie in this repository with their weights: `evaluate.py --workdir=FOLDER` measures"
    yield "the same figures again, `bitsperdim.load(FOLDER)` opens them. Where images of TFDS are not in its usual"
    yield "folder, the scripts want `--config.data.data_dir=FOLDER`."
    yield ""
    heads = ("run", "images", "measured here", "published", "the run has")
    yield from record.markdown(heads, [summary(run, measured[workdir]) for workdir, run in runs])
    for workdir, run in runs:
        sys.stderr.write(f"{workdir}\n")
        yield from section(workdir, run, measured[workdir])


def evaluated(run: Run) -> dict[str, Any]:
    """The figures of a run; InputError where there are none."""
    name = evaluation.file_name("evaluation")
    path = next((folder / name for folder in (run.workdir, run.outputs) if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{run.workdir / name} is missing; python evaluate.py --workdir={run.workdir} makes it")
    return run_lib.read_json(path)


def rows(run: Run, measured: Mapping[str, Any]) -> list[Row]:
    """The figures that are results, of the run or else of its stages, in the order of KINDS."""
    stages = {name: value for name, value in measured.items() if isinstance(value, dict)}
    found = []
    for pattern, unit, kind in KINDS:
        for figure, value in _numbers(measured, stages):
            match = None if figure.endswith("_standard_error") else re.fullmatch(pattern, figure)
            if match and not any(row.figure == figure for row in found):
                unit_of = unit or ("nats an image" if figure.startswith("nats") else "bits/dim")
                kind_of = kind.format(*match.groups()) if kind else ESTIMATES.get(run.family.__name__, "")
                found.append(Row(figure, value, _standard_error(figure, stages), unit_of, kind_of))
    # The literature tells likelihoods of binary images in nats, those of others in bits/dim.
    levels = run_lib.read_json(run.folder(run.stages()[0].name) / "data.json").get("levels")
    drop = "bits_per_dim" if levels == 2 else "nats"
    return [row for row in found if not re.fullmatch(rf"{drop}(_importance_weighted_\d+)?", row.figure)]


def _numbers(measured: Mapping[str, Any], stages: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Those of the whole run, then those of its stages, but for what the run has in sum or under the stage's name."""
    yield from ((name, value) for name, value in measured.items() if isinstance(value, float))
    for values in stages.values():
        own = {name: value for name, value in values.items() if not re.fullmatch("nats_per_code|rate_.*", name)}
        yield from ((name, value) for name, value in own.items() if isinstance(value, float))


def _standard_error(figure: str, stages: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of the mean over images; of bits/dim that of the nats, if it has none of its own."""
    for name, values in stages.items():
        of_stage = figure.removesuffix(f"_{name}")
        if f"{of_stage}_standard_error" in values and of_stage in values and (figure in values or of_stage != figure):
            return values[f"{of_stage}_standard_error"]
        if figure == "bits_per_dim" and {"bits_per_dim", "nats", "nats_standard_error"} <= values.keys():
            return values["nats_standard_error"] * values["bits_per_dim"] / values["nats"]
    return None


def told(row: Row) -> str:
    """Value, standard error and unit, as the tables have it: the error to two digits, the value as far as that goes."""
    if not row.error:
        return f"{row.value:.4g} {row.unit}"
    digits = max(0, 1 - int(f"{row.error:e}".partition("e")[2]))
    return f"{row.value:.{digits}f} ± {row.error:.{digits}f} {row.unit}"


def summary(run: Run, measured: Mapping[str, Any]) -> list[str]:
    """A row of the first table."""
    name, _ = nearest(run)
    results = rows(run, measured)
    images = "; ".join(dict.fromkeys(f"{split}, {count:,}" for split, count in splits(measured)))
    here = "<br>".join(f"{told(row)} ({row.kind})" for row in results)
    beside = "<br>".join(f"{r.value:g} {r.unit} ({r.source})" for r in references(name, results)) or "none"
    return [f"`{run.workdir.name}`", images, here, beside, f"{size_of_run(run).parameters:,} parameters"]


def splits(measured: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What was measured on, by stage: the name of the split and its number of images; codes are of the same images."""
    stages = [value for value in measured.values() if isinstance(value, dict)]
    return [(value["split"], value["images"]) for value in stages if "codes" not in value["split"]]


def section(workdir: str, run: Run, measured: Mapping[str, Any]) -> Iterator[str]:
    """All about one run."""
    name, changes = nearest(run)
    results = rows(run, measured)
    yield ""
    yield f"## {run.workdir.name}"
    yield ""
    lines = run_lib.read_json(path) if (path := run.workdir / "environment.json").exists() else {}
    on = f"{lines['devices']} on {lines['cpus']} processor core(s), jax {lines['jax']}" if lines else "unknown hardware"
    images = "; ".join(f"{split}, {count:,} images" for split, count in dict.fromkeys(splits(measured)))
    yield f"Measured on {images}. Trained on {on}{_duration(run)}."
    yield ""
    yield "```bash"
    yield (
        " \\\n    ".join([f"python train.py --config={name}", *changes]) if name else "# of no config that is installed"
    )
    yield evaluation.command(workdir, measured)
    yield "```"
    yield ""
    cells = [(r.figure, f"{r.value:.6g}", f"{r.error:.2g}" if r.error else None, r.unit, r.kind) for r in results]
    yield from record.markdown(("figure", "value", "standard error", "unit", "estimate"), cells)
    yield ""
    beside = references(name, results)
    if not beside:
        yield "No published figure: none is known for these images and levels."
    for reference in beside:
        row = next(row for row in results if row.figure == reference.figure)
        yield f"Published: {reference.value:g} {reference.unit} ({reference.source}); here {told(row)}."
        yield f"Why they differ: {'; '.join(differences(run, reference)) or 'not known'}. {reference.remark}".rstrip()


def _duration(run: Run) -> str:
    """What the steps took by the logged speeds, evaluations and compilation apart."""
    seconds = 0.0
    for stage in run.stages():
        speeds = [r for r in metrics.read(run.folder(stage.name) / metrics.FILE) if r.get("images_per_second")]
        if stage.settings and speeds:
            middle = sorted(r["images_per_second"] for r in speeds)[len(speeds) // 2]
            seconds += stage.settings.steps * stage.settings.batch_size / middle
    if seconds < 30:
        return ""
    return f", where all steps took {seconds / 60:,.0f} minutes of the clock beside whatever else ran there"


def references(name: str, results: Sequence[Row]) -> list[Reference]:
    """The published figures beside which the results of a config stand."""
    found: dict[str, Reference] = {}
    for reference in REFERENCES:
        if re.fullmatch(reference.configs, name) and any(row.figure == reference.figure for row in results):
            found.setdefault(reference.figure, reference)
    return list(found.values())


def differences(run: Run, reference: Reference) -> Iterator[str]:
    """What our run has less or other than the published setting, as far as configs tell."""
    theirs, ours = size_of_config(reference.setting), size_of_run(run)
    for what, here, there in (
        ("parameters", ours.parameters, theirs.parameters),
        ("training images seen", ours.seen, theirs.seen),
    ):
        if here != there:
            yield f"{here:,} {what} instead of {there:,}"
    keys = [key for key in theirs.config if key.startswith("data.") and key not in IGNORED]
    for key in keys:
        if ours.config.get(key) != theirs.config[key]:
            yield f"`{key}` is {ours.config.get(key)!r} instead of {theirs.config[key]!r}"


class Size(NamedTuple):
    """Parameters of all stages; training images that the one with most sees, repeated ones counted; the flat config."""

    parameters: int
    seen: int
    config: dict[str, Any]


@functools.cache
def size_of_config(name: str) -> Size:
    """The published settings: all stages that the config has."""
    values = config_files.load(name)
    flat = _plain(run_lib.parse(values)[1])
    with plan.planned(values) as (run, mesh):
        stages = [stage for stage in run.stages() if stage.model]
        return Size(_count(run, stages, mesh), _seen(stages), flat)


@functools.cache
def size_of_run(run: Run) -> Size:
    """Of the stages that it has trained."""
    stages = [stage for stage in run.stages() if stage.model and trained.restored_step(run, stage.name)]
    return Size(_count(run, stages, sharding.mesh_at_hand(run.config.mesh)), _seen(stages), _plain(run.config))


def _count(run: Run, stages: Sequence[Stage], mesh: Mesh) -> int:
    states = (trained.abstract_state(run, stage, stage.model(run), mesh) for stage in stages if stage.model)
    return sum(map(state_lib.num_params, states))


def _seen(stages: Sequence[Stage]) -> int:
    return max((of.steps * of.batch_size for stage in stages if (of := stage.settings)), default=0)


IGNORED = {f"data.{key}" for key in (*run_lib.PATH_KEYS, "download", "decode_threads", "cache_limit_gib")}


def _plain(config: Any) -> dict[str, Any]:
    return dict(config_lib.flatten(config_lib.to_plain(config)))


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """Every installed config and variant, flat, by NAME:VARIANT."""
    found = {}
    for name in config_files.names():
        for variant in ("", *catalogue.variants(catalogue.docstring(name))):
            full = f"{name}:{variant}" if variant else name
            found[full] = _plain(run_lib.parse(config_files.load(full))[1])
    return found


def nearest(run: Run) -> tuple[str, list[str]]:
    """The config that a run was made of, and the flags that change it to the run's; ('', []) where none is of its
    family. Keys that do not change what is learned are left out, and what is done with a trained run."""
    ours = _plain(run.config)
    best: tuple[str, list[str]] = "", []
    for name, theirs in known().items():
        if theirs["family"] == ours["family"]:
            keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
            keys = [key for key in keys if _counts(key)]
            flags = [f"--config.{key}={_flag(ours.get(key))}" for key in keys]
            if not best[0] or len(flags) < len(best[1]):
                best = name, flags
    return best


def _counts(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name not in run_lib.FREE_KEYS and section.split(".")[0] not in run_lib.FREE_SECTIONS


def _flag(value: Any) -> str:
    text = repr(tuple(value)) if isinstance(value, list) else str(value)
    return f"'{text}'" if re.search(r"[^\w.:/+-]", text) else text
