"""Downloads a TFDS data set and prepares it as array_record files.

    python -m bitsperdim.prepare cifar10 --data_dir=FOLDER

Most builders of TFDS open archives or encode images with TensorFlow, which this command needs. Those that do not are
prepared by the run that misses their data (`fetch`), without it.

Not here: reading what is prepared (`tfds_source.py`).
"""

import argparse
import contextlib
import importlib.util
import inspect
import io
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath

# Names by which a builder calls TensorFlow, itself or through TFDS, which opens archives with it.
OF_TENSORFLOW = frozenset({"tensorflow", "tf", "extract", "download_and_extract", "iter_archive"})
SECONDS_TO_CONNECT = 10
SECONDS_BETWEEN_LOOKS = 1.0


class WrongName(Exception):
    """TFDS has no such data set. The text follows 'and'."""


class Unprepared(Exception):
    """The data set could not be prepared here and now. The text follows 'and'."""


def fetch(name: str, root: epath.Path) -> None:
    """Downloads and prepares a data set in `root`. Raises `WrongName` and `Unprepared`.

    A data set that needs TensorFlow, which is not installed, is not begun, as far as its code tells. What fails
    half-way leaves nothing behind but whole downloads. Of several processes, which all see `root`, the first prepares
    and the others wait; where it fails it ends, and JAX ends the others.
    """
    import tensorflow_datasets as tfds  # seconds to import, for data that are missing only

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # which is for results
            builder: Any = tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise WrongName("TFDS knows none of this name") from None
    except Exception as error:  # builders raise anything
        raise WrongName(f"TFDS has no builder for it ({_reason(error)})") from error
    if builder.builder_config is not None and "/" not in name:
        raise WrongName(f"it has the configurations {', '.join(builder.builder_configs)}")
    if importlib.util.find_spec("tensorflow") is None and OF_TENSORFLOW & _names_in(type(builder)):
        raise Unprepared("preparing it needs TensorFlow")
    if jax.process_index() == 0:
        _prepare(builder, root)
    else:
        _wait_for(builder.data_path)


def _prepare(builder: Any, root: epath.Path) -> None:
    """`fetch`, once it is known that it may work."""
    import tensorflow_datasets as tfds

    urls = builder.url_infos or {}
    if not (root / "downloads" / builder.name).exists():  # what was downloaded before needs no network
        _check_reachable(urls)
    size = sum(info.size for info in urls.values())  # of all configurations
    told = f"up to {size / 2**20:,.1f} MiB to download" if size else "of unknown size"
    print(f"downloading and preparing {builder.info.full_name} in {root} ({told})", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with _tidied(builder, root), contextlib.redirect_stdout(io.StringIO()):
            _keep_tensorflow_from_gpus()
            builder.download_and_prepare(download_config=config)
    except Exception as error:  # whatever it was, the run cannot go on without these data
        missing = [cause.name or "" for cause in _causes(error) if isinstance(cause, ImportError)]
        if any(name.split(".")[0] == "tensorflow" for name in missing):
            raise Unprepared("preparing it needs TensorFlow") from error
        raise Unprepared(f"preparing it failed ({_reason(error)})") from error


def _names_in(builder: type) -> set[str]:
    """Every name that the code of a builder uses; that of TFDS itself, which it inherits, is not looked at."""
    own = [kind for kind in builder.__mro__ if not kind.__module__.startswith(("tensorflow_datasets.core", "builtins"))]
    functions = [inspect.unwrap(getattr(value, "__func__", value)) for kind in own for value in vars(kind).values()]
    pending = [function.__code__ for function in functions if isinstance(function, types.FunctionType)]
    names: set[str] = set()
    while pending:
        code = pending.pop()
        names |= set(code.co_names)
        pending += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    return names


def _check_reachable(urls: Iterable[str]) -> None:
    """Asks for the first address once, since TFDS would ask for minutes."""
    import requests

    url = next((url for url in urls if url.startswith("http")), "")
    try:
        if url:
            requests.head(url, timeout=SECONDS_TO_CONNECT)
    except requests.RequestException as error:
        raise Unprepared(f"{url.split('/')[2]}, where it is downloaded from, cannot be reached") from error


@contextlib.contextmanager
def _tidied(builder: Any, root: epath.Path) -> Iterator[None]:
    """Removes half a download, and folders that were made and are empty. TFDS removes what it has half prepared."""
    downloads = root / "downloads"
    folders = [*reversed(builder.data_path.parents), downloads, downloads / "extracted", downloads / builder.name]
    new = [folder for folder in folders if not folder.exists()]
    partial = lambda: set((downloads / builder.name).glob("*.tmp.*"))
    before = partial()
    try:
        yield
    finally:
        for path in partial() - before:
            path.rmtree(missing_ok=True)
        for folder in reversed(new):
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                os.rmdir(folder)


def _keep_tensorflow_from_gpus() -> None:
    """It would take all of their memory, which is JAX's."""
    if importlib.util.find_spec("tensorflow") is not None:
        import tensorflow  # pyright: ignore[reportMissingImports]

        tensorflow.config.set_visible_devices([], "GPU")


def _wait_for(path: epath.Path) -> None:
    print(f"waiting for the first process to prepare {path}", file=sys.stderr, flush=True)
    while not path.exists():
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: Exception) -> str:
    """The first line of the first cause: TFDS wraps it several times."""
    *_, first = _causes(error)
    return (str(first).strip() or type(first).__name__).splitlines()[0][:200]


def main() -> int:
    """0, or 2 with a message where TensorFlow is missing."""
    parser = argparse.ArgumentParser(prog="python -m bitsperdim.prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="as in TFDS: 'cifar10', 'celeb_a_hq/64', 'cifar10:3.0.2'")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    arguments = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        print('error: preparing data needs TensorFlow: pip install "bitsperdim[prepare]"', file=sys.stderr)
        return 2
    import tensorflow_datasets as tfds

    _keep_tensorflow_from_gpus()
    builder = tfds.builder(arguments.name, data_dir=arguments.data_dir, file_format="array_record")
    builder.download_and_prepare()
    print(f"prepared {builder.data_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
