"""Which way the arrows run, what no file may do, and that every published config stands."""

import ast
import importlib.util
import pathlib
import re
import tomllib

import pytest

from bitsperdim import catalogue, config_files, plan
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [name for name in PROJECT["tool"]["setuptools"]["packages"] if name != "bitsperdim.configs"]
FAMILIES = [name for name in PACKAGES if name != "bitsperdim"]
# A family imports another only where the mathematics does: predictive sampling serves the priors of VQ-VAE-2.
MAY_IMPORT = {("vqvae2", "arm_forecast")}
SOURCES = {path: ast.parse(path.read_text()) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def imported(tree):
    """The top-level packages that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


def test_every_source_is_seen():
    assert len(SOURCES) > 25
    assert FAMILIES and CONFIGS
    # What is not installed is not covered by these rules, so a new package must be in pyproject.toml.
    with_code = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert with_code == set(PACKAGES)


@every_source
def test_arrows_run_from_the_families_to_the_shared_code(path):
    package = path.relative_to(ROOT).parts[0]
    for name in set(imported(SOURCES[path])) & set(FAMILIES):
        assert name == package or (package, name) in MAY_IMPORT, f"{path} imports {name}"


@every_source
def test_no_private_jax_and_no_pickle(path):
    text = path.read_text()
    assert "jax._src" not in text
    assert not set(imported(SOURCES[path])) & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load", "jnp.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle") == "False", f"line {node.lineno}"


@every_source
def test_files_say_what_they_are_and_public_functions_what_they_do(path):
    tree = SOURCES[path]
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            # A short function or section of a config whose name says it all may do without.
            short = node.end_lineno - node.lineno < 12
            assert ast.get_docstring(node) or short, f"{node.name} has no docstring"


@every_source
def test_no_random_numbers_without_a_key(path):
    """NumPy's global generator and Python's would break the promise that noise is a function of (seed, step)."""
    assert "random" not in set(imported(SOURCES[path]))
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Philox", "Generator", "SeedSequence"), f"line {node.lineno}: np.random.{node.attr}"


@every_config
def test_a_config_names_its_command_what_it_is_meant_for_and_what_it_should_reach(path):
    text = catalogue.docstring(str(path))
    assert f"python train.py --config=configs/{path.name}" in text
    assert all(catalogue.section(text, key) for key in catalogue.SUMMARY.values())


@pytest.mark.slow
@every_config
def test_a_config_has_as_many_parameters_as_it_says(path):
    said = re.findall(r"([\d.]+) M", catalogue.section(catalogue.docstring(str(path)), "Parameters"))
    try:
        with plan.planned(config_files.load(str(path))) as (run, mesh):
            stages = [stage for stage in run.stages() if stage.model is not None]
            counts = [plan.of_stage(run, stage, mesh, compiles=False)["parameters"] for stage in stages]
    except InputError as error:
        pytest.skip(f"the images must be there to count: {error}")
    assert said == [f"{count / 1e6:.{len(text.partition('.')[2])}f}" for count, text in zip(counts, said, strict=True)]


def test_a_section_of_a_docstring_ends_at_the_next_key_not_at_a_colon():
    text = "Meant for: any size\n`of images`, by rows: `image_height=64`.\nReach: that depends.\n"
    assert catalogue.section(text, "Meant for") == "any size `of images`, by rows: `image_height=64`."


@every_config
def test_a_config_parses_in_every_variant_that_it_names_and_tiny_is_one(path):
    names = ["", *catalogue.variants(catalogue.docstring(str(path)))]
    assert "tiny" in names
    parsed = {}
    for name in names:
        _, parsed[name] = run_lib.parse(config_files.load(f"{path}:{name}"))
    assert len({repr(config) for config in parsed.values()}) == len(names), "two variants are the same"


@every_config
def test_an_unknown_variant_is_refused_with_those_that_are(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"no variant 'nonsense'; .*tiny"):
        module.get_config("nonsense")
