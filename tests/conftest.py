"""Eight CPU devices in every test process, the golden vectors, and the folder of real data sets."""

import importlib
import os
import pathlib

# Nearly all of the time goes into compiling small programs, which is done twice as fast without optimising them, and
# again by two fifths without the newer emitters, each of whose kernels begins with an MLIR context of its own.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def golden():
    """`golden("vqvae2/polyak_ema")` -> the arrays of a golden file as a dict; skips where the files are absent."""

    def load(name):
        path = SHARED / "golden" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"golden vectors are not in {SHARED / 'golden'}")
        with np.load(path) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def tfds_dir():
    """A TFDS data directory with real data sets; skips where it is absent."""
    if not (SHARED / "data").exists():
        pytest.skip(f"no TFDS data directory at {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def benchmark():
    """`benchmark("rate_distortion")` -> the script of that name, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="session")
def assert_example():
    """`assert_example(run, "top")`: what the stage says of an example before there is one is what its source reads."""

    def check(run, name):
        stage = run.stage(name)
        one = stage.source(run, "train").read(np.arange(1))
        found = {field: (leaf.shape, leaf.dtype) for field, leaf in stage.example(run).items()}
        assert found == {field: (rows.shape[1:], rows.dtype) for field, rows in one.items()}

    return check


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """The same program is compiled once a session, in child processes too, as the scripts do between runs."""
    folder = tmp_path_factory.mktemp("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield
