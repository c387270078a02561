"""The README's commands: what is said of those that `tests/readme.py` leaves out or makes smaller is still so."""

import importlib.util
import pathlib
import re

import PIL.Image

from bitsperdim import config_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tests" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_rule_of_the_script_is_needed_and_no_training_is_run_in_full():
    readme = script()
    commands = [command for _, chosen in readme.planned(TEXT) for command in chosen]
    for pattern in readme.SKIPPED:
        assert any(re.search(pattern, command) for command, _, _ in commands), pattern
    for _, _, reason in readme.CHANGED:
        assert any(reason in reasons for _, _, reasons in commands), reason
    for _, run, _ in commands:
        for name in re.findall(r"train\.py --config=(\S+)(?!.*--plan)", run):
            assert name.endswith(":tiny"), run


def test_what_the_readme_names_is_there():
    for path in re.findall(r"\]\(((?:pictures|notebooks)/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
    for path in (ROOT / "pictures").glob("*.png"):
        assert path.stat().st_size < 100_000
        assert f"pictures/{path.name}" in TEXT
        PIL.Image.open(path).verify()
    named = set(re.findall(r"`(?:configs/)?((?:vqvae2|vdvae|flows|arm)_\w+)\.py`", TEXT))
    assert named == set(config_files.names())
