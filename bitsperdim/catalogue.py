"""What configs there are, as their docstrings say it: `train.py --list`, and `--list=NAME` for the variants of one.

A config's docstring begins with one line that says what it is; further down stand `Meant for:` (hardware),
`Parameters:` (of each stage, without a variant), `Reach:` (the figure to expect) and `Variants:` (names with remarks in
brackets), each of which may run on over several lines.
Not here: how a config is found and loaded (`config_files.py`); what its step takes (`plan.py`).
"""

import ast
import re
import textwrap
from collections.abc import Iterator

from ml_collections import ConfigDict

from bitsperdim import config_files, plan
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

WIDTH = 120
SUMMARY = {"for": "Meant for", "parameters": "Parameters", "reach": "Reach"}


def docstring(name: str) -> str:
    """Of the file of a config. Nothing in it is run."""
    path = config_files.find(name)
    try:
        return ast.get_docstring(ast.parse(path.read_text())) or ""
    except SyntaxError as error:
        raise InputError(f"{path} could not be read: {error}") from error


def section(text: str, key: str) -> str:
    """What a docstring says behind `key:`, up to the next such key or an empty line, on one line; '' without.

    A key begins its line with a capital letter, and its colon comes before any full stop.
    """
    found = re.search(rf"^{key}: (.*?)(?=^[A-Z][^:.\n]*: |^\s*$|\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def variants(text: str) -> dict[str, str]:
    """Name and remark of each variant that a docstring names."""
    return dict(re.findall(r"([\w.]+)\s*(?:\(([^()]*)\))?\s*[,;.]", section(text, "Variants")))


def overview() -> Iterator[str]:
    """All configs: what they are, their data, hardware, parameters and target, the names of their variants."""
    for name in config_files.names():
        text = docstring(name)
        yield f"{name}: {text.partition(chr(10))[0]}"
        yield from _wrapped("data", data_of(config_files.load(name)))
        for label, key in SUMMARY.items():
            # The first sentence says it; what is behind it is for who opens the file.
            said = re.split(r"(?<=[^.]\.) (?=[A-Z])", section(text, key))[0]
            yield from _wrapped(label, said)
        yield from _wrapped("variants", ", ".join(variants(text)))
    yield "--config=NAME or NAME:VARIANT trains one; --list=NAME says more of one, with the parameters of each variant"


def of(name: str) -> Iterator[str]:
    """One config: its docstring, then for each variant its remark, its data and the parameters of every stage."""
    text = docstring(name)
    yield text
    yield ""
    for variant, remark in ({"": ""} | variants(text)).items():
        yield from describe(f"{name}:{variant}" if variant else name, remark)


def describe(name: str, remark: str = "") -> Iterator[str]:
    """One variant: its remark, its data, and the parameters and steps of every stage that is trained."""
    values = config_files.load(name)
    yield from textwrap.wrap(f"{name}{f': {remark}' if remark else ''}", WIDTH, subsequent_indent="    ")
    yield from _wrapped("data", data_of(values))
    try:
        with plan.planned(values) as (run, mesh):
            for stage in run.stages():
                if stage.model is not None:
                    record = plan.of_stage(run, stage, mesh, compiles=False)
                    said = f"{record['parameters']:,} parameters, {record['steps']:,} steps of {record['batch_size']:,}"
                    yield from _wrapped(stage.name, said)
    except InputError as error:  # of images that must be there to say what they are like
        yield from _wrapped("parameters", f"not known: {error}")


def data_of(values: ConfigDict) -> str:
    """Source and name of a config's images, and what they are like where that can be told without them."""
    given = values.to_dict()["data"]
    source = " ".join(given[key] for key in ("source", "name") if given.get(key))
    try:
        about = plan.facts_of(run_lib.parse(values)[1].data)
    except InputError:
        return source
    return f"{source}, {' x '.join(map(str, about.shape))} of {about.levels} levels"


def _wrapped(label: str, said: str) -> list[str]:
    lead = f"  {label:<11} "
    return textwrap.wrap(said, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead)) if said else []
