"""The scripts as people call them: what is printed, what is written, and the exit code."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import toy_family

from bitsperdim import cli, config_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOY = pathlib.Path(toy_family.__file__).with_name("toy.py")
TRAIN, EVALUATE, SAMPLE = cli.train, cli.evaluate, cli.sample


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(cli.train, *flags)` -> exit code, stdout, stderr."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            code = script() or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(call, tmp_path, monkeypatch):
    """`refusal(cli.train, *flags)` -> the message of an input error, which is all that is said and done."""
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(script, *flags)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("error: ") == 1
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A complete toy run; its config and checkpoints are not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", f"--config={TOY}", f"--workdir={folder}"])
        cli.train()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.log_evry=5"], "unknown key 'train.log_evry' in --config; did you mean 'train.log_every'?"),
        (["--config.optm.name=adam"], "unknown key 'optm.name' in --config; did you mean 'optim.name'?"),
        (
            ["--config.train=5"],
            "'train' is a section of the config: one of its keys is set by --config.train.KEY=VALUE",
        ),
        (["--config.train.steps=many"], "steps"),
        (["--config.train.steps=1.5"], "steps"),
        (["--config.optim.learning_rate=fast"], "learning_rate"),
        (["--config.train.steps=0"], "config value train.steps must be at least 1, not 0"),
        (["--config.train.ema_ramp=perhaps"], "ema_ramp"),
        (["--config.mesh.rules=kernel"], "rules"),
        (["--config.mesh.rules=(('kernel', ('fsdp', 3)),)"], "rules"),
        (["--config.train.batch_size=12"], "is not divisible by the 8 devices"),
        (
            ["--config.data.source=tfds", "--config.data.name=mnist", "--config.data.data_dir=none"],
            "'mnist' is not in ",
        ),
        (["--stage=top"], "there is no stage 'top' in "),
        (["--workdri=here"], "workdri"),
        (["here"], "unexpected argument 'here'"),
        (["--workdir=/proc/run"], "cannot write to /proc/run"),
    ],
)
def test_training_refuses_in_one_message_and_leaves_no_folder(refusal, flags, message):
    assert message in refusal(TRAIN, f"--config={TOY}", *flags)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "--config is missing"),
        (["--config"], "--config is missing"),
        (["--config="], "--config is missing"),
        (["--config=vqvae2_foto"], "there is no config 'vqvae2_foto'; known are "),
        (["--config=none.py"], "there is no config 'none.py'"),
        (["--config=vqvae2_photos:tinny"], "--config=vqvae2_photos:tinny: no variant 'tinny'; there are tiny"),
        (["--config=broken.py"], "broken.py could not be loaded: ZeroDivisionError: division by zero"),
        (["--config=syntax.py"], "syntax.py could not be loaded: SyntaxError"),
        (["--config=empty.py"], "empty.py could not be loaded: AttributeError"),
        (["--config=wrong.py"], "'model.hidden' must be of type int, not str ('16')"),
        (["--config=typo.py"], "unknown key 'model.hiden' in --config; did you mean 'model.hidden'?"),
        (["--config=rules.py"], "'mesh.rules[0][1][1]' must be of type str, not int (3)"),
        (["--config=lacking.py"], "the config lacks the key 'optim.name'"),
        (["--config=nothing.py"], "get_config in nothing.py must return a ConfigDict, not None"),
    ],
)
def test_a_config_that_cannot_be_used_is_named_with_what_is_wrong(refusal, tmp_path, config, message):
    plain = TOY.read_text().replace("def get_config", "def plain")
    edit = lambda line: f"{plain}\ndef get_config(_):\n    c = plain()\n    {line}\n    return c\n"
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "syntax.py").write_text("def get_config(:")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "nothing.py").write_text("def get_config(variant): return None")
    (tmp_path / "wrong.py").write_text(edit("c.model = {'hidden': '16'}"))
    (tmp_path / "typo.py").write_text(edit("c.model = {'hiden': 16}"))
    (tmp_path / "rules.py").write_text(edit("c.mesh = {'rules': (('kernel', ('fsdp', 3)),)}"))
    (tmp_path / "lacking.py").write_text(edit("del c.optim['name']"))
    assert message in refusal(TRAIN, *config)


def test_a_workdir_that_is_a_file_or_holds_other_things_is_refused(refusal, tmp_path):
    (tmp_path / "file").write_text("dear")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("dear")
    assert "file is a file" in refusal(TRAIN, f"--config={TOY}", "--workdir=file")
    assert "cannot write to file/run: Not a directory" in refusal(TRAIN, f"--config={TOY}", "--workdir=file/run")
    assert "folder is not empty and is no run" in refusal(TRAIN, f"--config={TOY}", "--workdir=folder")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_place_is_refused(refusal, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write to locked/run" in refusal(TRAIN, f"--config={TOY}", "--workdir=locked/run")


def test_a_run_of_another_config_is_refused_with_the_differences(refusal, trained):
    message = refusal(TRAIN, f"--config={TOY}", f"--workdir={trained}", "--config.model.hidden=8")
    assert message.splitlines()[1:] == ["         model.hidden   16 -> 8"]


def test_a_stage_whose_predecessor_is_missing_names_it(refusal):
    message = refusal(TRAIN, "--config=vqvae2_photos:tiny", "--stage=top", "--workdir=run")
    assert "stage 'top' needs 'autoencoder', which is not complete in run" in message
    assert "--stage=autoencoder first" in message


@pytest.mark.parametrize("script", [EVALUATE, SAMPLE])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=none"], "there is no run folder none"),
        (["--workdir=."], "is no run: it has no config.json"),
        (["--workdir=.", "--sede=1"], "sede"),
        (["--workdir=.", "here"], "unexpected argument 'here'"),
    ],
)
def test_evaluation_and_sampling_refuse_what_is_no_run(refusal, script, flags, message):
    assert message in refusal(script, *flags)


def test_a_run_that_is_not_trained_yet_can_be_neither_evaluated_nor_sampled(refusal, toy_config, tmp_path):
    cli.run_lib.create(cli.run_lib.check(tmp_path / "run", toy_config()))
    assert "no stage of run is complete; finish its training first" in refusal(EVALUATE, "--workdir=run")
    assert "stage 'model' of run has no checkpoint yet; train it first" in refusal(SAMPLE, "--workdir=run")


@pytest.mark.parametrize(
    ("script", "flag"),
    [(EVALUATE, "--split=test"), (SAMPLE, "--num=0"), (SAMPLE, "--temperature=-1"), (SAMPLE, "--seed=one")],
)
def test_flags_out_of_range_are_named(refusal, trained, script, flag):
    assert flag.partition("=")[0].removeprefix("--") in refusal(script, f"--workdir={trained}", flag)


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (EVALUATE, "--samples=4", "--samples means nothing for a run of toy_family"),
        (SAMPLE, "--figure=pruning", "--figure=pruning is no figure of a run of toy_family; it has none"),
        (SAMPLE, "--decode=train", "a run of toy_family has no stored latents to decode"),
        (SAMPLE, "--keep=0.03", "--keep means nothing for a run of toy_family; it knows --temperature"),
    ],
)
def test_what_a_family_does_not_offer_is_refused(refusal, trained, script, flag, message):
    assert message in refusal(script, f"--workdir={trained}", flag)


def test_results_that_cannot_be_written_are_an_input_error(call, trained, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(SAMPLE, f"--workdir={trained}", f"--out={tmp_path / 'file'}")
    assert code == 2
    assert err.startswith(f"error: cannot write to {tmp_path / 'file'}")


@pytest.mark.parametrize("script", [EVALUATE, SAMPLE])
def test_results_that_could_not_be_written_are_not_computed(refusal, trained, tmp_path, monkeypatch, script):
    def wasted(*_):
        raise AssertionError("computed for nothing")

    monkeypatch.setattr(cli.trainer, "evaluate", wasted)
    monkeypatch.setattr(toy_family, "load", wasted)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        assert refusal(script, f"--workdir={trained}", f"--out={out}") == (
            f"cannot write to {out}: Not a directory; use another --out=FOLDER"
        )


def test_evaluation_writes_where_it_is_told(call, trained, tmp_path):
    before = sorted(trained.rglob("*"))
    code, out, _ = call(EVALUATE, f"--workdir={trained}", f"--out={tmp_path / 'there'}", "--split=train")
    assert code == 0 and out.endswith(f"written to {tmp_path / 'there/evaluation-train.json'}\n")
    assert json.loads((tmp_path / "there/evaluation-train.json").read_text())["model"]["images"] == 1437
    assert sorted(trained.rglob("*")) == before


def test_evaluation_takes_other_places_of_the_data(call, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.trainer, "evaluate", lambda run, split: seen.append(run.config.data) or {"split": split})
    monkeypatch.setattr(cli, "_writing_to", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(cli.run_lib, "write_json", lambda *_: None)
    monkeypatch.setenv("HOME", "/home/me")
    assert call(EVALUATE, f"--workdir={trained}", "--config.data.data_dir=~/tfds", "--config.data.cache_dir=/c")[0] == 0
    assert (seen[0].data_dir, seen[0].cache_dir) == ("/home/me/tfds", "/c")


def test_the_traceback_is_there_for_those_who_ask(call, tmp_path):
    code, _, err = call(TRAIN, f"--config={tmp_path / 'none.py'}", "--traceback")
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("error: there is no config")


def test_training_that_stays_non_finite_exits_with_4(call, tmp_path):
    flags = ["--config.model.nan_from=2", "--config.train.max_non_finite=2", f"--workdir={tmp_path / 'run'}"]
    code, _, err = call(TRAIN, f"--config={TOY}", *flags)
    assert code == 4
    assert err.splitlines()[-1].startswith("error: loss or gradients were not finite for 2 steps in a row")
    assert "Traceback" not in err


def test_a_defect_of_ours_keeps_its_traceback(call, trained, monkeypatch):
    monkeypatch.setattr(cli.trainer, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(EVALUATE, f"--workdir={trained}")


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, SAMPLE])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_one_screen_and_names_the_flags(call, script, flag):
    code, out, err = call(script, flag, "--workdir=none")
    assert (code, err) == (0, "")
    assert 1 <= len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 120
    known = {TRAIN: ["config", "workdir", "stage"], EVALUATE: ["workdir", "split"]}
    for name in known.get(script, ["workdir", "num", "seed", "temperature", "label", "out"]):
        assert f"--{name}" in out


def test_configs_are_listed_with_what_they_are_for_and_their_variants(call):
    code, out, err = call(TRAIN, "--list")
    assert (code, err) == (0, "")
    heads = [line.partition(":")[0] for line in out.splitlines() if line[0] not in " -"]
    assert heads == config_files.names()
    photos = out.partition("vqvae2_photos: ")[2].partition("\nvqvae2_tiny")[0]
    for said in (
        *("crops of two photographs", "photos, 32 x 32 x 3 of 256 levels", "one CPU core", "MSE at most 5%"),
        "tiny, pixels",
    ):
        assert said in photos
    assert max(map(len, out.splitlines())) < 140


def test_one_config_is_listed_with_its_variants_data_and_parameters(call):
    code, out, err = call(TRAIN, "--list=vqvae2_photos")
    assert (code, err) == (0, "")
    base, tiny, pixels = re.findall(r"\nvqvae2_photos(?::\w+)?.*(?:\n  .*)*", out)
    assert "photos, 32 x 32 x 3 of 256 levels" in base and "top         530,112 parameters, 500 steps of 32" in base
    assert ":tiny: seconds; for tests" in tiny and "530,112" not in tiny
    assert "pixels      258,468 parameters" in pixels


def test_a_section_that_a_config_leaves_out_is_no_value(refusal):
    said = refusal(TRAIN, "--config=flows_digits", "--config.model.dequantization=1")
    assert said.startswith("'model.dequantization' is a section that this config leaves out")


def test_the_list_of_a_config_that_is_none_names_those_that_are(refusal):
    assert "vqvae2_photos" in refusal(TRAIN, "--list=nonsense")


@pytest.mark.parametrize("name", ["vqvae2_photos", "configs/vqvae2_photos.py", str(ROOT / "configs/vqvae2_photos.py")])
def test_a_config_is_found_by_its_name_and_by_its_path(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an installed package has no checkout to stand in
    assert config_files.find(name).samefile(ROOT / "configs" / "vqvae2_photos.py")
    assert config_files.load(f"{name}:tiny").autoencoder.train.steps < config_files.load(name).autoencoder.train.steps


def test_a_file_of_ones_own_comes_before_the_config_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mine = "from ml_collections import ConfigDict\nget_config = lambda variant: ConfigDict({'family': 'mine'})"
    (tmp_path / "vqvae2_photos.py").write_text(mine)
    assert config_files.load("vqvae2_photos.py").family == "mine"
    assert config_files.load("vqvae2_photos").family == "vqvae2"


def test_the_default_workdir_is_named_after_config_and_variant(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(cli.trainer, "train", lambda config, *where: asked.append(where))
    call(TRAIN, f"--config={TOY}")
    call(TRAIN, "--config", "vqvae2_photos:tiny", "--stage=top")
    call(TRAIN, "--config=vqvae2_photos:tiny", "--workdir=here", "--init_from=there")
    assert asked == [("runs/toy-base", "", ""), ("runs/vqvae2_photos-tiny", "top", ""), ("here", "", "there")]


def test_flags_reach_the_config_whether_the_file_names_their_key_or_not(call, monkeypatch):
    configs = []
    monkeypatch.setattr(cli.trainer, "train", lambda config, *_: configs.append(cli.run_lib.parse(config)[1]))
    flags = ["--config.seed=9", "--config.train.skip_norm=5", "--config.optim.b1=0.5", "--config.mesh.rules=()"]
    assert call(TRAIN, f"--config={TOY}", *flags)[0] == 0
    [config] = configs
    assert (config.seed, config.train.skip_norm, config.optim.b1, config.mesh.rules) == (9, 5.0, 0.5, ())


def test_evaluation_prints_and_writes_the_same_figures(call, trained):
    code, out, _ = call(EVALUATE, f"--workdir={trained}")
    written = json.loads((trained / "evaluation.json").read_text())
    assert code == 0
    assert (written["split"], written["model"]["images"], written["model"]["step"]) == ("evaluation", 360, 12)
    assert f"{written['bits_per_dim']:.6g}" in out


def test_figures_of_training_and_held_out_images_stand_side_by_side(call, trained, tmp_path):
    _, first, _ = call(EVALUATE, f"--workdir={trained}", f"--out={tmp_path}")
    assert "difference" not in first
    code, out, _ = call(EVALUATE, f"--workdir={trained}", f"--out={tmp_path}", "--split=train")
    held_out, train = (json.loads((tmp_path / f"evaluation{of}.json").read_text()) for of in ("", "-train"))
    assert code == 0 and (held_out["model"]["images"], train["model"]["images"]) == (360, 1437)
    [row] = [line.split() for line in out.splitlines() if line.startswith("bits_per_dim ")][1:]
    values = train["bits_per_dim"], held_out["bits_per_dim"], held_out["bits_per_dim"] - train["bits_per_dim"]
    np.testing.assert_allclose([float(cell) for cell in row[1:]], values, rtol=1e-4)
    # Figures of another step say nothing about each other.
    train["model"]["step"] += 1
    (tmp_path / "evaluation-train.json").write_text(json.dumps(train))
    assert "difference" not in call(EVALUATE, f"--workdir={trained}", f"--out={tmp_path}")[1]


def samples(call, trained, folder, *flags):
    code, _, _ = call(SAMPLE, f"--workdir={trained}", f"--out={folder}", *flags)
    assert code == 0
    return folder


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(call, trained, tmp_path):
    first, again, other = (
        samples(call, trained, tmp_path / name, f"--seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in ("samples.npy", "samples.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_a_sample_does_not_depend_on_how_many_are_drawn(call, trained, tmp_path):
    few, many = (np.load(samples(call, trained, tmp_path / str(n), f"--num={n}") / "samples.npy") for n in (3, 20))
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many.reshape(20, -1), axis=0)) == 20


def test_samples_are_written_as_array_picture_and_record(call, trained, tmp_path):
    folder = samples(call, trained, tmp_path, "--num=5", "--seed=7", "--temperature=0.5")
    array = np.load(folder / "samples.npy", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.uint8, (5, 8, 8, 1))
    record = json.loads((folder / "sampling.json").read_text())
    assert (record["num"], record["seed"], record["temperature"], record["network_calls"]) == (5, 7, 0.5, 1)
    with PIL.Image.open(folder / "samples.png") as picture:
        assert picture.mode == "RGB"


def test_the_best_share_is_drawn_from_more_samples_and_recorded(call, trained, tmp_path, monkeypatch):
    (tmp_path / "scorers.py").write_text("def ink(images, labels): return images.sum((1, 2, 3))")
    monkeypatch.chdir(tmp_path)
    folder = samples(call, trained, tmp_path / "out", "--num=6", "--accept_top=1,0.25", "--scorer=scorers:ink")
    plain = np.load(samples(call, trained, tmp_path / "plain", "--num=6") / "samples.npy")
    record = json.loads((folder / "rejection.json").read_text())
    scores = np.array(record["scores_by_round"])
    assert scores.shape == (4, 6)
    np.testing.assert_array_equal(scores[0], plain.sum((1, 2, 3)))
    best = np.load(folder / "samples.npy").sum((1, 2, 3))
    assert sorted(best) == sorted(scores.ravel())[-6:]
    assert (folder / "samples_top_1.png").read_bytes() == (tmp_path / "plain/samples.png").read_bytes()
    assert (folder / "samples_top_0.25.png").read_bytes() == (folder / "samples.png").read_bytes()
    assert json.loads((folder / "sampling.json").read_text())["accept_top"] == [1.0, 0.25]


def test_samples_are_shown_beside_the_nearest_training_images(call, trained, tmp_path):
    folder = samples(call, trained, tmp_path, "--num=3", "--nearest=2")
    record = json.loads((folder / "nearest.json").read_text())
    train = cli.data.open_source(cli.run_lib.open_run(trained).config.data, "train")
    nearest = train.read(np.array(record["index"])[:, 0])["image"].astype(np.int64)
    apart = ((np.load(folder / "samples.npy") - nearest) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(np.array(record["distance"])[:, 0] ** 2, apart)
    with PIL.Image.open(folder / "nearest.png") as picture:
        width, height = picture.size
        assert width == 3 * 98 - 2 and 3 * 98 < height < 3 * 98 + 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=warm"], "--temperature must be a number, not 'warm'"),
        (["--temperature=top=1,bottom=2"], "a run of toy_family has no levels; give one number"),
        (["--top_k=2"], "--top_k means nothing for a run of toy_family; it knows --temperature"),
        (["--accept_top=0.5"], "--accept_top=SHARE and --scorer=MODULE:FUNCTION need each other"),
        (["--scorer=math:sin"], "--accept_top=SHARE and --scorer=MODULE:FUNCTION need each other"),
        (["--accept_top=2", "--scorer=math:sin"], "--accept_top must lie in 0..1, not 2"),
        (["--accept_top=0.5", "--scorer=math:sinn"], "math has no function 'sinn'"),
        (["--accept_top=0.5", "--scorer=math:sin"], "the function of --scorer failed: TypeError"),
        (["--candidates=64"], "--candidates=N needs --accept_top=SHARE"),
        (["--accept_top=0.5", "--scorer=math:sin", "--candidates=9"], "--candidates=9 is too few"),
        (["--features=math:sin"], "--features needs --nearest=K"),
        (["--nearest=0"], "nearest"),
        (["--nearest=9999"], "--nearest must lie in 1..1437"),
    ],
)
def test_options_of_sampling_that_do_not_fit_are_refused(refusal, trained, flags, message):
    assert message in refusal(SAMPLE, f"--workdir={trained}", "--out=out", *flags)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "sample.py"])
def test_the_scripts_themselves_end_with_the_code_and_one_message(script, tmp_path):
    flags = ["--config=none"] if script == "train.py" else ["--workdir=none"]
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: there is no ")
