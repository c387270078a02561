"""A published run gives what the run gave, is never written into, and a file that is not what was written is named."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import bitsperdim
from bitsperdim import cli, export, published, trained, trainer, warm_start
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT = {"train.steps": 4, "train.evaluate_every": 4, "train.pictures_every": 4, "train.save_every": 4}
FOLDERS = sorted(path.parent for path in ROOT.glob("published/*/config.json"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def workdir(toy_config, tmp_path_factory):
    """A complete, evaluated run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = trainer.train(toy_config(SHORT), str(folder))
    run_lib.write_json(run.workdir / "evaluation.json", trainer.evaluate(run, "evaluation"))
    return folder


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    """What is published of it; not to be changed."""
    folder = tmp_path_factory.mktemp("published") / "toy"
    export.export(run_lib.open_run(workdir), run_lib.place(folder))
    return folder


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """One to be spoilt; what is made of it goes to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return pathlib.Path(shutil.copytree(whole, tmp_path / "toy"))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(folder, arrays=None, **metadata):
    """The file again by the library alone, with other arrays or metadata, and a checksum that is theirs."""
    path = folder / "model.safetensors"
    old = published.read(run_lib.place(folder))
    arrays = old.arrays if arrays is None else arrays
    kept = {"bitsperdim": "1", "steps": json.dumps(old.steps), "sha256": published.digest(arrays)}
    path.write_bytes(safetensors.numpy.save(arrays, {k: v for k, v in (kept | metadata).items() if v is not None}))


def refusal(folder):
    with pytest.raises(InputError) as caught:
        trained.restore(run_lib.open_run(folder), "model", jax.make_mesh((1, 1), ("data", "fsdp")))
    return str(caught.value)


def test_it_holds_the_averaged_weights_bit_for_bit_and_nothing_that_only_training_needs(
    workdir, whole, saved_state, assert_same_bits
):
    found = published.read(run_lib.place(whole))
    assert found.steps == {"model": 4}
    state = saved_state(workdir)
    named = {f"model/{entry}/{path}": value for entry in ("ema", "extra") for path, value in flat(state[entry])}
    assert_same_bits(found.arrays, named)
    assert {path.name for path in whole.iterdir()} == {
        *("README.md", "config.json", "environment.json", "evaluation.json", "model.safetensors", "model")
    }


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in leaves]


def test_it_is_opened_measured_and_sampled_like_the_run_and_stays_as_it_is(workdir, copy):
    before = contents(copy)
    key = jax.random.key(3)
    np.testing.assert_array_equal(bitsperdim.load(copy).sample(key, 4), bitsperdim.load(workdir).sample(key, 4))
    measured = trainer.evaluate(run_lib.open_run(copy), "evaluation")
    assert measured == json.loads((copy / "evaluation.json").read_text())
    cli._evaluate(["evaluate.py", f"--workdir={copy}"])
    cli._sample(["sample.py", f"--workdir={copy}", "--num=2", "--out=elsewhere"])
    assert json.loads(pathlib.Path("runs/published-toy/evaluation.json").read_text()) == measured
    assert pathlib.Path("elsewhere/samples.png").exists()
    assert contents(copy) == before


def test_it_is_not_trained_further_but_a_run_can_begin_with_it(copy, toy_config):
    with pytest.raises(InputError, match=r"is a published run.*--init_from="):
        trainer.train(toy_config(SHORT), str(copy))
    run = run_lib.check("next", toy_config(SHORT))
    stage = run.stage("model")
    like = trained.abstract_state(run, stage, stage.model(run), jax.make_mesh((1, 1), ("data", "fsdp")))
    warm_start.check(run, stage, like, str(copy))
    begun = warm_start.begin(run, stage, like, str(copy))
    assert begun.record == {"init_from": {"run": str(copy), "step": 4}}
    arrays = published.read(run_lib.place(copy)).arrays
    for path, value in flat(begun.weights["ema"]):
        np.testing.assert_array_equal(value, arrays[f"model/ema/{path}"])


@pytest.mark.parametrize("cut", [0, 5, 100, -4])
def test_a_file_that_is_cut_off_is_named(copy, cut):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert re.match(rf"{path} is damaged, or no safetensors file \(.+\); get the folder anew", refusal(copy))


def test_scalars_and_arrays_without_elements_keep_their_shapes(tmp_path):
    arrays = {"codes/extra/updates": np.array(7, np.int32), "codes/extra/none": np.zeros((0, 3), np.float32)}
    published.write(run_lib.place(tmp_path), published.Weights({"codes": 1}, arrays))
    found = published.read(run_lib.place(tmp_path)).arrays
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {n: (a.shape, a.dtype) for n, a in arrays.items()}


def test_a_flipped_bit_is_noticed(copy):
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    assert refusal(copy) == f"{path} has changed since it was written (sha256 of its arrays); get the folder anew"


def test_files_of_others_are_named(copy):
    path = copy / "model.safetensors"
    arrays = published.read(run_lib.place(copy)).arrays
    rewrite(copy, bitsperdim=None)
    assert f"{path} is no published run: its metadata should say bitsperdim='1', but lacks the key" in refusal(copy)
    path.write_bytes(safetensors.numpy.save(arrays, {"bitsperdim": "2"}))
    assert "should say bitsperdim='1', but has '2'" in refusal(copy)
    path.write_bytes(b'{"model": "pickle"}' * 40)
    assert f"{path} is damaged, or no safetensors file" in refusal(copy)


def test_arrays_that_are_not_those_of_the_config_are_named(copy):
    name, path = "model/ema/encoder/kernel", copy / "model.safetensors"
    arrays = published.read(run_lib.place(copy)).arrays
    rewrite(copy, {key: value for key, value in arrays.items() if key != name})
    assert refusal(copy).startswith(
        f"stage 'model' of {path} has no array 'ema/encoder/kernel', which should be float32"
    )
    rewrite(copy, arrays | {name: arrays[name].T.copy()})
    assert re.match(r"'ema/encoder/kernel' is float32\[16,64\] in .*, but should be float32\[64,16\]", refusal(copy))
    rewrite(copy, arrays | {"model/ema/third/kernel": np.zeros(2, np.float32)})
    assert "has an array 'ema/third/kernel' float32[2], which should not be there" in refusal(copy)
    rewrite(copy, arrays, steps='{"other": 3}')
    assert "has no checkpoint yet" in refusal(copy)
    rewrite(copy, arrays, steps="[3]")
    assert refusal(copy) == f"{path} is damaged (its metadata have no steps of stages); get the folder anew"


def test_an_export_neither_overwrites_nor_publishes_what_is_unfinished_or_measured_at_other_steps(
    workdir, copy, toy_config, tmp_path, capsys
):
    with pytest.raises(InputError, match="is not empty; use a new --export"):
        export.export(run_lib.open_run(workdir), run_lib.place(copy))
    with pytest.raises(InputError, match="is a published run already"):
        export.export(run_lib.open_run(copy), run_lib.place("again"))
    old = pathlib.Path(shutil.copytree(workdir, tmp_path / "old"))
    measured = json.loads((old / "evaluation.json").read_text())
    (old / "evaluation.json").write_text(json.dumps(measured | {"model": measured["model"] | {"step": 3}}))
    export.export(run_lib.open_run(old), run_lib.place("other"))
    assert "evaluation.json: left out" in capsys.readouterr().err
    assert not pathlib.Path("other/evaluation.json").exists()
    shutil.rmtree(old / "model" / "checkpoints")
    with pytest.raises(InputError, match=r"no stage of .* is complete"):
        export.export(run_lib.open_run(old), run_lib.place("empty"))


@every_folder
def test_what_lies_beside_the_code_fits_it_and_names_no_place_of_a_machine(folder):
    run = run_lib.open_run(folder)
    assert all(not getattr(run.config.data, key) for key in run_lib.PATH_KEYS)
    weights = published.read(run.workdir)
    for name, step in weights.steps.items():
        stage = run.stage(name)
        like = trained.abstract_state(run, stage, stage.model(run), jax.make_mesh((1, 1), ("data", "fsdp")))
        published.check(run.workdir, name, {entry: like[entry] for entry in ("ema", "extra")}, "")
        assert step == stage.settings.steps or stage.settings.best_metric
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    assert not [text for text in texts if re.search(r"(?<![\w.])/(work|tmp|home|root)/", text)]


def test_what_lies_beside_the_code_is_small():
    sizes = {path: path.stat().st_size for path in ROOT.glob("published/**/*") if path.is_file()}
    assert FOLDERS and sum(sizes.values()) < 12e6
