"""The command line: flags of the scripts, and what these do. Called by `scripts.py`; exit codes: `exit_codes.py`."""

import contextlib
import inspect
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from bitsperdim import (
    adopt,
    atomic,
    catalogue,
    config_files,
    data,
    decoding,
    evaluation,
    exit_codes,
    export,
    flag_config,
    flag_values,
    hosts,
    images,
    metrics,
    neighbours,
    plan,
    rejection,
    run_plots,
    sampler_table,
    sharding,
    trainer,
)
from bitsperdim import config as config_lib
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Loaded
from bitsperdim.run import Run
from bitsperdim.sources import Source, reduce_bits

LARGEST_FIGURE = 256  # rows of it: more are no picture any more, and are all in memory at once


def train() -> None:
    """Trains every stage of a config that is not complete, in order; the same command again goes on.

    python train.py --config=NAME[:VARIANT] [flags]

      --config=NAME[:VARIANT]   an installed config by name, or a file
      --config.KEY=VALUE        another value for any key, such as --config.data.data_dir=FOLDER
      --workdir=FOLDER          the run's folder; default runs/NAME-VARIANT
      --stage=STAGE             this stage alone; latents of a very deep VAE, a data set as latents, runs only so
      --init_from=RUN           begin with the weights of another run
      --list, --list=NAME       the configs, with hardware, figures and variants; of one, each variant's data and
                                parameters
      --plan=DEVICES            train nothing: parameters, memory, arithmetic and traffic of a step on so many devices
      --chip=NAME               of the plan: does it fit, how long is a step; v3 v4 v5e v5p a100 h100, or its peak
                                figures as TFLOPS:GIB:GB_PER_SECOND
      --plan_out=FILE           the plan's figures, a JSON line a stage, added to it
      --deterministic           on GPUs: the same bits in every run, more slowly
      --multihost=HOW           one of several processes that train together: tpu, slurm or HOST:PORT,NUM,ID; README
      --traceback               show where an error comes from
    """
    exit_codes.run(_train, train.__doc__)


def evaluate() -> None:
    """Measures every complete stage of a run over all images of a split; prints a table, writes evaluation.json.

    python evaluate.py --workdir=RUN [flags]

      --split=evaluation        or train; test of a folder with data.test_fraction; any split of a TFDS data set.
                                Codes are kept of train and evaluation: stages on codes are left out on the others
                                Another split than evaluation is written to evaluation-SPLIT.json; once there is
                                evaluation-train.json too, both are shown side by side
      --samples=K               of the importance-weighted bound, where the family has one (flows, vdvae)
      --plots                   measures nothing: draws curves, samplers and the family's plots from what the run has
                                recorded, as PNG files
      --out=FOLDER              for these files; default the run's folder
      --config.data.KEY=FOLDER  where the data are now; KEY is path, evaluation_path, data_dir or cache_dir
      --multihost=HOW           one of several processes that measure together, as for train.py
      --traceback               show where an error comes from
    """
    exit_codes.run(_evaluate, evaluate.__doc__)


def sample() -> None:
    """Draws pictures from a run; writes samples.png, samples.npy (uint8 levels, NHWC) and sampling.json.

    python sample.py --workdir=RUN [flags]

      --num=16 --seed=0         number of samples, seed of their noise; sample i does not depend on --num
      --out=FOLDER              for the pictures; default the run's folder
      --temperature=1.0         of the noise; 0 is greedy. By level too, as top_k and top_p: top=0.9,bottom=1
      --output_temperature=1.0  vdvae: of the pixels given the latents; 0: the likeliest ones
      --label=CLASS             one class; default: all classes in turn
      --accept_top=SHARE        draws num / SHARE (or --candidates=N), keeps the best of each class; 1,0.5: a grid each
      --scorer=MODULE:FUNCTION  the scores for it: (images, labels or None) -> [n], higher is better
      --nearest=K               also nearest.png: each sample beside the K training images nearest in pixel space
      --features=MODULE:FUNCTION  nearest in this space instead: images -> numbers [n, ...]
      --config.data.KEY=FOLDER  where the images are now, as for evaluate.py
      --figure=NAME             all: reconstruction interpolation; vdvae: progressive swap pruning; flows: scales
      --decode=SPLIT            images from what train.py --stage=latents has stored of a split: decoded-SPLIT.npy

    Where the model is autoregressive over pixels or codes (sampling.npz then has the network calls of each image):
      --top_k=K --top_p=P       the K likeliest values alone; the likeliest ones that together have the probability P
      --sampler=NAME            default: the fastest for the batch, as --compare_samplers measured it; VQ-VAE-2: cached
      --batch_size=N            images drawn at once
      --given=FILE.npy          known pixels [h, w, c] or [n, h, w, c], -1 where the model is to fill in
      --compare_samplers        measure every sampler; writes samplers.json, row by row, so it can go on, and pictures
      --traceback               show where an error comes from
    """
    exit_codes.run(_sample, sample.__doc__)


def convert() -> None:
    """Makes a run of published weights, for evaluate.py, sample.py and further training; or publishes a run.

    python convert.py --family=FAMILY --checkpoint=FILE --workdir=RUN [flags]
    python convert.py --export=FOLDER --workdir=RUN

      --export=FOLDER           the trained run as a published one: config.json, model.safetensors (averaged weights
                                alone, no pickle), its figures. evaluate.py, sample.py, --init_from and bitsperdim.load
                                take the folder like a run, and write nothing into it
      --family=FAMILY           arm_forecast: PixelCNN++ of pclucas14/pixel-cnn-pp, its state_dict;
                                flows: MaCow of XuezheMax/macow, its state_dict;
                                vdvae: Efficient-VDVAE of Rayhane-mamah/Efficient-VDVAE (PyTorch or JAX), VDVAE of
                                openai/vdvae, a file as it was released;
                                vqvae2: the autoencoder of rosinality/vq-vae-2-pytorch, its state_dict
      --checkpoint=FILE         arrays as .npz, or a file of PyTorch (pip install 'bitsperdim[convert]')
      --image_size=32           of the images that the weights were trained on; not for vdvae
      --hparams=FILE            vdvae: the hyper-parameters, where they do not lie beside the checkpoint
      --config.KEY=VALUE        another value for any key of the run's config, such as --config.data.data_dir=FOLDER
      --traceback               show where an error comes from
    """
    exit_codes.run(_convert, convert.__doc__)


def _train(argv: list[str]) -> None:
    if listed := [argument for argument in argv if argument.partition("=")[0] in ("--list", "-list")]:
        name = listed[0].partition("=")[2]
        for line in catalogue.of(name) if name else catalogue.overview():
            print(line, flush=True)
        return
    name, argv = flag_config.pop(argv)
    values = flags.FlagValues()
    flag_config.define(values, config_files.load(name), argv)
    flags.DEFINE_string("workdir", "", "Run folder; default runs/<config>-<variant>.", flag_values=values)
    flags.DEFINE_string("stage", "", "Train this stage alone.", flag_values=values)
    flags.DEFINE_string("init_from", "", "Run whose weights new stages start with.", flag_values=values)
    flags.DEFINE_integer("plan", None, "Devices to plan for.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("chip", "", "Of the plan.", flag_values=values)
    flags.DEFINE_string("plan_out", "", "File for the plan.", flag_values=values)
    flags.DEFINE_string("multihost", None, "How processes find each other.", flag_values=values)
    flags.DEFINE_boolean("deterministic", False, "On GPUs.", flag_values=values)
    _parse(values, argv)
    if values.plan is not None:
        if values.multihost is not None:
            raise InputError("--multihost means nothing beside --plan, which needs one process for any mesh")
        plan.write(values.config, values.plan, values.chip, values.stage, values.plan_out)
        return
    for flag in ("chip", "plan_out"):
        if values[flag].value:
            raise InputError(f"--{flag} belongs to a plan; give --plan=DEVICES too")
    if values.deterministic:
        # Read by XLA when the first device is touched.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {run_lib.DETERMINISTIC}".strip()
    _join(values)
    trainer.train(values.config, values.workdir or flag_config.default_workdir(name), values.stage, values.init_from)


def _join(values: flags.FlagValues) -> None:
    if values.multihost is not None:
        hosts.join(values.multihost)


def _evaluate(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Run folder.", flag_values=values)
    flags.DEFINE_string("split", "evaluation", "Split to measure on.", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the figures; default the run folder.", flag_values=values)
    flags.DEFINE_integer("samples", None, "Of the importance-weighted bound.", flag_values=values)
    flags.DEFINE_boolean("plots", False, "Draw what was recorded.", flag_values=values)
    flags.DEFINE_string("multihost", None, "How processes find each other.", flag_values=values)
    run, folder = _parse_and_open(values, argv)
    if values.plots:
        _plot(run, values, folder)
        return
    if values.samples is not None:
        run = run_lib.with_evaluation(run, samples=values.samples)
    measured = trainer.evaluate(run, values.split)
    with hosts.together():
        if hosts.is_first():
            _write_evaluation(measured, values.split, folder)


def _plot(run: Run, values: flags.FlagValues, folder: epath.Path) -> None:
    for name in ("split", "samples", "multihost"):
        if values[name].present:
            raise InputError(f"--{name} means nothing beside --plots, which measures nothing; --out does")
    with _writing_to(folder):
        for name, picture in run_plots.draw(run).items():
            images.save_png(folder / f"{name}.png", picture)
            print(f"written to {folder / f'{name}.png'}")


def _write_evaluation(measured: dict[str, Any], split: str, folder: epath.Path) -> None:
    print(metrics.table(list(config_lib.flatten(measured)), ("figure", "value")))
    path = folder / evaluation.file_name(split)
    with _writing_to(folder):
        run_lib.write_json(path, measured)
    if rows := evaluation.side_by_side(folder):
        print(metrics.table(rows, ("figure", *evaluation.COMPARED, "difference")))
    print(f"written to {path}")


def _sample(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Run folder.", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the pictures; default the run folder.", flag_values=values)
    flags.DEFINE_integer("num", 16, "Number of samples.", lower_bound=1, flag_values=values)
    largest = 2**63 - 1  # of a seed
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", -largest, largest, flag_values=values)
    flags.DEFINE_boolean("compare_samplers", False, "Measure every sampler.", flag_values=values)
    flags.DEFINE_integer("label", None, "Class to sample.", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "Images drawn at once.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("candidates", None, "Samples to choose from.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("figure", None, "Figure to draw instead of samples.", flag_values=values)
    flags.DEFINE_string("decode", None, "Split to decode instead of samples.", flag_values=values)
    flags.DEFINE_integer("nearest", None, "Nearest training images.", lower_bound=1, flag_values=values)
    # Their values are read by `flag_values`.
    of_draw = (name for name in flag_values.OF_DRAW if name not in ("label", "batch_size"))
    for name in (*of_draw, "accept_top", "scorer", "features"):
        flags.DEFINE_string(name, None, "See `sample`.", flag_values=values)
    run, folder = _parse_and_open(values, argv)
    shares = flag_values.shares("accept_top", values.accept_top) if values.accept_top else ()
    scorer, features = flag_values.chosen_functions(values)
    loaded = run.family.load(run, sharding.mesh_at_hand(run.config.mesh))
    if values.compare_samplers:
        _compare_samplers(run, loaded, values, folder)
        return
    given = {name: values[name].value for name in flag_values.OF_DRAW if values[name].value is not None}
    if values.figure:
        _figure(run, loaded, values, given, folder)
        return
    if values.decode:
        _decode(run, loaded, values.decode, folder)
        return
    options = flag_values.draw_options(given, loaded, run)
    source = data.open_source(run.config.data, "train") if values.nearest else None
    if source is not None:
        if source.levels != loaded.levels:  # a model of fewer bits than it sees
            source = reduce_bits(source, loaded.levels.bit_length() - 1)
        neighbours.check_count(values.nearest, source)  # before hours of drawing
    start = time.perf_counter()
    if scorer is None:
        pictures, about = loaded.draw(jax.random.key(values.seed), values.num, **options)
        grids, record = {}, None
    else:
        given = values.seed, values.num, shares, values.candidates, options, run_lib.stream()
        pictures, about, grids, record = rejection.draw_best(loaded.draw, scorer, *given)
    seconds = time.perf_counter() - start
    chosen = {"given": values.given} if values.given else {}
    chosen |= {"scorer": values.scorer} if values.scorer else {}
    about = {"num": values.num, "seed": values.seed, **options, **chosen, **about}
    by_image = {name: about.pop(name) for name in list(about) if isinstance(about[name], np.ndarray)}
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in ({"samples": pictures} | grids).items():
            images.save_png(folder / f"{name}.png", images.grid(some, levels=loaded.levels))
        with (folder / "samples.npy").open("wb") as file:
            np.save(file, pictures)
        run_lib.write_json(folder / "sampling.json", about | {"seconds_with_compilation": round(seconds, 3)})
        if record is not None:
            run_lib.write_json(folder / "rejection.json", {"scorer": values.scorer, **record})
        elif by_image:
            with (folder / "sampling.npz").open("wb") as file:
                np.savez_compressed(file, **by_image)
    print(f"{values.num} samples in {seconds:.1f} s (compilation included): {folder / 'samples.png'}")
    if source is not None:
        _nearest(pictures, source, values.nearest, features, loaded.levels, folder)


def _nearest(
    pictures: np.ndarray, source: Source, k: int, features: Callable | None, levels: int, folder: epath.Path
) -> None:
    progress = metrics.counting("training images", source.size, run_lib.stream())
    found = neighbours.nearest(pictures, source, k, features, progress)
    with _writing_to(folder):
        images.save_png(folder / "nearest.png", neighbours.picture(pictures, found, levels))
        about = {"source": source.name, "index": found.index.tolist(), "distance": found.distance.tolist()}
        run_lib.write_json(folder / "nearest.json", about)
    print(f"nearest images of {source.name}: {folder / 'nearest.png'}")


def _compare_samplers(run: Run, loaded: Loaded, values: flags.FlagValues, folder: epath.Path) -> None:
    if loaded.compare_samplers is None:
        raise InputError(f"a run of {run.family.__name__} has one sampler, so there is nothing to compare")
    for name in (*flag_values.OF_DRAW, "num", "nearest", "accept_top"):
        if values[name].present:
            raise InputError(f"--{name} means nothing beside --compare_samplers; --seed and --out do")
    with _writing_to(folder):
        rows, pictures = sampler_table.measure(loaded.compare_samplers, run, values.seed, folder)
        for name, picture in pictures.items():
            images.save_png(folder / f"{name}.png", picture)
    shown = [name for name, value in rows[0].items() if not isinstance(value, list)]
    print(metrics.table([tuple(row.get(name) for name in shown) for row in rows], tuple(shown)))
    print(f"written to {folder / sampler_table.FILE} and {', '.join(f'{name}.png' for name in pictures)}")


def _figure(run: Run, loaded: Loaded, values: flags.FlagValues, given: dict[str, Any], folder: epath.Path) -> None:
    name = values.figure
    if name not in loaded.figures:
        there = f"there are {', '.join(loaded.figures)}" if loaded.figures else "it has none"
        raise InputError(f"--figure={name} is no figure of a run of {run.family.__name__}; {there}")
    if values.num > LARGEST_FIGURE:
        raise InputError(f"--num={values.num}: a figure shows at most {LARGEST_FIGURE} images")
    options = flag_values.options(given, loaded.figures[name], f"the figure '{name}'", run)
    picture, record = loaded.figures[name](jax.random.key(values.seed), values.num, run_lib.stream(), **options)
    with _writing_to(folder):
        images.save_png(folder / f"{name}.png", picture)
        run_lib.write_json(folder / f"{name}.json", {"seed": values.seed, **record})
    if rows := record.get("rows"):
        print(metrics.table([tuple(row.values()) for row in rows], tuple(rows[0])))
    print(f"written to {folder / f'{name}.png'} and {name}.json")


def _decode(run: Run, loaded: Loaded, split: str, folder: epath.Path) -> None:
    if loaded.decode_stored is None:
        raise InputError(f"a run of {run.family.__name__} has no stored latents to decode")
    with _writing_to(folder):
        about = decoding.write(*loaded.decode_stored(split), split, loaded.levels, folder, run_lib.stream())
    print(metrics.table(list(about.items()), ("figure", "value")))
    print(f"written to {folder / f'decoded-{split}.npy'}, .png and .json")


def _convert(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("export", None, "Folder of a published run.", flag_values=values)
    flags.DEFINE_string("family", None, "Package of the models.", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "File of weights.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Run folder.", flag_values=values)
    flags.DEFINE_integer("image_size", None, "Edge of the images.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("hparams", None, "File of hyper-parameters.", flag_values=values)
    changes = [argument for argument in argv if argument.startswith("--config.")]
    _parse(values, [argument for argument in argv if argument not in changes])
    if values.export is not None:
        _export(values, changes)
        return
    family = run_lib.family(_required(values, "family"))
    if not hasattr(family, "imported"):
        raise InputError(f"the family '{values.family}' has no importer of published weights")
    options = {name: values[name].value for name in ("image_size", "hparams") if values[name].value is not None}
    for name in options:
        if name not in inspect.signature(family.imported).parameters:
            raise InputError(f"--{name} is not for --family={values.family}")
    imported = family.imported(_required(values, "checkpoint"), **options)
    changed = flags.FlagValues()
    flag_config.define(changed, imported.config, changes)
    _parse(changed, [argv[0], *changes])
    run = adopt.adopt(_required(values, "workdir"), imported._replace(config=changed.config))
    print(f"{run.workdir} is a run now: evaluate.py and sample.py take it as --workdir")


def _export(values: flags.FlagValues, changes: list[str]) -> None:
    given = [
        f"--{name}" for name in ("family", "checkpoint", "image_size", "hparams") if values[name].value is not None
    ]
    for flag in [*given, *changes]:
        raise InputError(f"{flag.partition('=')[0]} means nothing beside --export, which publishes a run as it is")
    folder = run_lib.place(values.export)
    with _writing_to(folder):
        export.export(run_lib.open_run(_required(values, "workdir")), folder)
    print(f"{folder} is a published run now: evaluate.py and sample.py take it as --workdir, bitsperdim.load opens it")


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument '{rest[1]}'; flags are written --name=value")


def _parse_and_open(values: flags.FlagValues, argv: list[str]) -> tuple[Run, epath.Path]:
    """The run of --workdir, its data where --config.data.KEY says, and the folder for what is found out of it."""
    for key in run_lib.PATH_KEYS:
        flags.DEFINE_string(f"config.data.{key}", None, "Where the data are now.", flag_values=values)
    _parse(values, argv)
    if "multihost" in values:
        _join(values)
    given = {key: values[f"config.data.{key}"].value for key in run_lib.PATH_KEYS}
    paths = {key: path for key, path in given.items() if path is not None}
    with hosts.together():
        run = run_lib.open_run(_required(values, "workdir"), paths)
        folder = run_lib.place(values.out) if values.out else run.outputs
        if run.is_published:
            run = run._replace(elsewhere=folder)
        if hosts.is_first():
            _check_writable(folder)
    return run, folder


@contextlib.contextmanager
def _writing_to(folder: epath.Path, flag: str = "--out") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; use another {flag}=FOLDER") from error


def _check_writable(folder: epath.Path) -> None:
    """Raises InputError before the work whose results could not be written. Leaves nothing behind."""
    if not atomic.is_remote(folder):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with _writing_to(folder), tempfile.TemporaryFile(dir=existing):
            pass


def _required(values: flags.FlagValues, name: str) -> Any:
    if values[name].value is None:
        raise InputError(f"--{name} is missing")
    return values[name].value
