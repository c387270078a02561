"""What a notebook needs beside the library: pictures as output of a cell, training that is watched, short trainings.

    run = trainer.train(config, workdir, watch=notebook.watch())
    notebook.show(images.grid(bitsperdim.load(workdir).sample(jax.random.key(0), 16)))

IPython is wherever a notebook is; nothing else here imports it. Not here: what is drawn (`images.py`, `plots.py`, the
figures of the families).
"""

import io
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from bitsperdim import config as config_lib
from bitsperdim import images, metrics, plots
from bitsperdim.observer import Watch
from bitsperdim.run import Run

WIDTH = 900  # pixels of the widest picture: a notebook with all its pictures stays small
SECONDS = 5.0  # between two looks at a training, each of which takes half a second of a processor
PANELS = 3  # curves of a training: the first figures of its log
POINTS, PICTURES = 20, 4  # of a curve, and times that pictures are drawn, where a training is made shorter


def shortened(values: ConfigDict, steps: int | None) -> ConfigDict:
    """The config with at most so many steps in every stage, and figures and pictures on the way; None: as it is."""
    values = values.copy_and_resolve_references()
    if steps is None:
        return values
    for section in _sections(values, "train"):
        section.steps = min(section.steps, steps)
        section.update({"log_every": -(-section.steps // POINTS), "pictures_every": -(-section.steps // PICTURES)})
        section.evaluate_every = section.save_every = section.steps
    return values


def watch(*prefixes: str) -> Watch:
    """For `trainer.train`: the curves of each stage, and below them its newest picture, as output that is replaced.

    Every few seconds, and at the end.

    `prefixes`: of names of pictures, the first that a stage has is shown ('samples'); without one the first picture.
    """
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    handles: dict[str, Any] = {}
    due: dict[str, float] = {}

    def look(run: Run, stage: str) -> None:
        folder, settings = run.folder(stage), run.stage(stage).settings
        records = metrics.read(folder / metrics.FILE)
        is_last = settings is not None and records[-1]["step"] == settings.steps
        if time.monotonic() < due.get(stage, 0.0) and not is_last:
            return
        page = _page(_below_each_other([_curves(records, stage), *_newest(folder / "images", prefixes)]))
        if stage in handles:
            handles[stage].update(page)
        else:
            handles[stage] = display(page, display_id=True)
        due[stage] = time.monotonic() + SECONDS

    return look


def show(*pictures: UInt8[np.ndarray, "h w 3"] | epath.PathLike) -> None:
    """Pictures, or files of pictures, one below the other."""
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    for picture in pictures:
        display(_page(picture if isinstance(picture, np.ndarray) else _read(epath.Path(picture))))


def table(record: Mapping[str, Any] | Iterable[Mapping[str, Any]], *columns: str) -> None:
    """Prints figures: a record as names and values, several as rows, of which `columns` are shown (default: all)."""
    if isinstance(record, Mapping):
        one: Any = record
        print(metrics.table(list(config_lib.flatten(one)), ("figure", "value")))
        return
    rows = list(record)
    columns = columns or tuple(rows[0])
    print(metrics.table([[row.get(name) for name in columns] for row in rows], columns))


def _sections(values: ConfigDict, name: str) -> Iterable[Any]:
    """Every section of that name, however deep."""
    for key, value in values.items():
        if isinstance(value, ConfigDict):
            yield from [value] if key == name else _sections(value, name)


def _curves(records: list[dict[str, Any]], stage: str) -> UInt8[np.ndarray, "h w 3"]:
    """Of the first figures alone: `plots.curves` draws all there are, for whom a minute's look is enough."""
    logged = (name for record in records if record["kind"] == "train" for name in record)
    names = [name for name in dict.fromkeys(logged) if name not in plots.HIDDEN][:PANELS]
    kept = ("step", "kind", *names)
    return plots.titled(plots.curves([{name: record.get(name) for name in kept} for record in records]), stage)


def _newest(folder: epath.Path, prefixes: tuple[str, ...]) -> list[UInt8[np.ndarray, "h w 3"]]:
    files = sorted(folder.glob("*-*.png"), key=lambda path: path.name) if folder.exists() else []
    if not files:
        return []
    step = max(path.stem.rpartition("-")[2] for path in files)
    newest = [path for path in files if path.stem.endswith(step)]
    wanted = [path for prefix in prefixes for path in newest if path.name.startswith(prefix)]
    return [_read((wanted or newest)[0])]


def _read(path: epath.Path) -> UInt8[np.ndarray, "h w 3"]:
    with path.open("rb") as file:
        return np.asarray(PIL.Image.open(file).convert("RGB"))


def _below_each_other(pictures: list[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    width = max(picture.shape[1] for picture in pictures)
    spare = lambda picture: ((0, 0), (0, width - picture.shape[1]), (0, 0))
    return np.concatenate([np.pad(picture, spare(picture), constant_values=images.WHITE) for picture in pictures])


def _page(picture: UInt8[np.ndarray, "h w 3"]) -> Any:
    """As output of a cell: a PNG, or a JPEG where that is smaller, as for photographs; PIL itself would give both."""
    from IPython.display import Image  # pyright: ignore[reportMissingImports]

    page, encoded = PIL.Image.fromarray(picture), []
    if page.width > WIDTH:
        page = page.resize((WIDTH, round(page.height * WIDTH / page.width)), PIL.Image.Resampling.LANCZOS)
    for format, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 90})):
        page.save(buffer := io.BytesIO(), format, **options)
        encoded.append(buffer.getvalue())
    return Image(data=min(encoded, key=len))
