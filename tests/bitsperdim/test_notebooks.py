"""The notebooks: each runs from top to bottom, and says nothing that would not be so elsewhere."""

import json
import pathlib
import tomllib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
CHEAPEST = "vdvae"
# What the parameters cell says instead, beside `variant` and `workdir`.
TINY = {name: {"steps": 3} for name in NOTEBOOKS}
TINY["arm_forecast"]["batches"] = (1,)
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def parameters(book):
    [cell] = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def outputs(book):
    """Of all cells: the texts of streams, and the pictures."""
    found = [output for cell in book.cells for output in cell.get("outputs", ())]
    shown = [kind for output in found for kind in output.get("data", {}) if kind.startswith("image/")]
    return "".join(output.get("text", "") for output in found), shown


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on a laptop; programs for eight take longer to compile."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")


def execute(name, folder, **given):
    """The notebook with other parameters, executed in a process of its own."""
    book = nbformat.read(NOTEBOOKS[name], 4)
    given = {"variant": "tiny", "workdir": "run"} | TINY[name] | given
    parameters(book).source += "".join(f"\n{key} = {value!r}" for key, value in given.items())
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return book


def check(book):
    """What each notebook shows: figures, and pictures beside the curves."""
    text, pictures = outputs(book)
    assert "bits_per_dim" in text or "rate_bits_per_image" in text
    assert len(pictures) >= 3


def test_the_cheapest_notebook_runs(tmp_path):
    book = execute(CHEAPEST, tmp_path)
    check(book)
    assert (tmp_path / "run" / "model" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != CHEAPEST])
def test_every_notebook_runs(name, tmp_path):
    check(execute(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vdvae", "flows", "arm"])
def test_own_images_take_any_family(family, tmp_path):
    check(execute("own_images", tmp_path, family=family))


@every_notebook
def test_a_notebook_is_ready_to_be_opened_elsewhere(name):
    text = NOTEBOOKS[name].read_text()
    assert len(text) < 1_000_000
    book = nbformat.reads(text, 4)
    nbformat.validate(book)
    given = [line.split(" = ")[0] for line in parameters(book).source.splitlines()]
    assert {"variant", "steps", "workdir"} <= set(given)
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    opened = f"(https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{name}.ipynb)"
    assert opened in book.cells[0].source
    assert f"git+{ADDRESS}" in book.cells[1].source
    for cell in book.cells:
        lines = cell.source.splitlines()
        assert max(map(len, lines)) <= 120 or cell.cell_type == "markdown", lines
        assert len(lines) <= 12, "a cell this long lacks a function of the library"


@every_notebook
def test_what_a_notebook_shows_is_no_error_and_of_no_machine(name):
    book = nbformat.read(NOTEBOOKS[name], 4)
    shown = json.dumps([cell.get("outputs", []) for cell in book.cells])
    assert "Traceback" not in shown
    here = [f"{folder}/" for folder in (ROOT, *ROOT.parents) if folder != folder.parent]
    assert not any(place in shown for place in ("/home/", "/root/", "/tmp/", *here))
