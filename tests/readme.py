"""The commands of the README, run one after the other in a fresh environment: `python tests/readme.py`.

Each block of ```bash is a script of its own, in a copy of this checkout and a new virtual environment; the blocks of
```python run with what was trained before them. What is left out and what is made smaller stands in the two tables
below, is printed with its reason, and nothing else is. `--list` shows what would be run.
Not here: whether the numbers in the README are what comes out.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# Commands that are not run, by a pattern found in them.
SKIPPED = {
    r"^gcloud ": "needs a TPU pod",
    r"^srun ": "needs a SLURM cluster",
    r"convert\.py --family": "needs a file of published weights",
    r"runs/published": "needs a file of published weights",
    r"cifar10": "needs CIFAR-10",
    r"binary_mnist": "needs MNIST",
}
# Commands that are run in another form: pattern, what stands there instead, and why.
CHANGED = [
    (
        r"(train\.py --config=(?:configs/)?(\w+)(?:\.py)?)(?=[\s:;&]|$)(?!:\w)(?!.*--workdir)(?!.*--plan)",
        r"\1:tiny --workdir=runs/\2-base",
        "a tiny training in the folder of the real one",
    ),
    (r"(train\.py --config=\w+)(?=\s)(?!.*--plan)", r"\1:tiny", "a tiny training"),
    (r"(_folder):cpu", r"\1:tiny", "a tiny training"),
    (
        r"python -m pytest -n auto",
        "python -m pytest -q tests/bitsperdim/test_likelihood.py",
        "one file of the tests, which take twenty minutes",
    ),
    (
        r"runs/k32 runs/k128 runs/k512 runs/k2048",
        "runs/k32",
        "the other three runs are those of 'and so on'",
    ),
]


def blocks(text):
    """(language, commands) of every block of bash or python: lines that go on are one command, comments are none."""
    for language, body in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            yield language, [body]
            continue
        lines = body.replace("\\\n", "").splitlines()
        commands = [re.sub(r"\s+#\s.*$", "", line).strip() for line in lines]
        yield language, [command for command in commands if command and not command.startswith("#")]


def planned(text):
    """(language, what is run as one script, [(command, what is run instead or '', the reasons)]) of every block."""
    for language, commands in blocks(text):
        chosen = []
        for command in commands:
            skipped = [why for pattern, why in SKIPPED.items() if language == "bash" and re.search(pattern, command)]
            if skipped:
                chosen.append((command, "", skipped))
                continue
            run, reasons = command, []
            for pattern, instead, reason in CHANGED if language == "bash" else ():
                # A parallel loop and a chain of commands are several, each with flags of its own.
                parts = re.split(r"( && |; )", run)
                changed = "".join(re.sub(pattern, instead, part) for part in parts)
                reasons += [reason] * (changed != run)
                run = changed
            chosen.append((command, run, reasons))
        yield language, chosen


def prepare(scratch):
    """A copy of the checkout, a new environment, and a home with a folder of pictures."""
    if not (scratch / "checkout").exists():
        leave = shutil.ignore_patterns(".git", "runs", "__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT, scratch / "checkout", ignore=leave)
        venv.create(scratch / "venv", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return environment | {
        "PATH": f"{scratch / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(scratch / "home"),
        "BITSPERDIM_CACHE": str(scratch / "cache"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


# What the README takes for granted: a folder of pictures in the home.
PICTURES = """
import pathlib
import PIL.Image
from sklearn.datasets import load_sample_images
folder = pathlib.Path.home() / "pictures"
folder.mkdir(parents=True)
for i in range(100):
    photograph = load_sample_images().images[i % 2]
    PIL.Image.fromarray(photograph[3 * i : 3 * i + 70, 5 * i : 5 * i + 90]).save(folder / f"{i}.png")
"""


def main():
    parser = argparse.ArgumentParser(description="Runs the commands of the README.")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    parser.add_argument("--folder", type=pathlib.Path, help="work here and leave it behind; what is there is used")
    parser.add_argument("--blocks", default="1:1000", help="FIRST:LAST alone, such as 3:5; needs what is before them")
    arguments = parser.parse_args()
    first, last = map(int, arguments.blocks.split(":"))
    scratch = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="readme-"))
    environment = {} if arguments.list else prepare(scratch.absolute())
    begun, failed = time.monotonic(), []
    for number, (language, commands) in enumerate(planned(README.read_text()), start=1):
        if not first <= number <= last:
            continue
        print(f"\n--- {number}: {language} " + "-" * 60)
        for command, run, reasons in commands:
            print(f"$ {command.strip()}")
            if reasons:
                print(f"    {'not run' if not run else f'run as: {run}'} ({'; '.join(reasons)})")
        script = "\n".join(run for _, run, _ in commands if run)
        if arguments.list or not script:
            continue
        if "pictures" in script and not (scratch / "home" / "pictures").exists():
            subprocess.run(["python", "-c", PICTURES], env=environment, check=True)
        start = time.monotonic()
        shell = ["python", "-"] if language == "python" else ["bash", "-e"]
        done = subprocess.run(
            shell, input=script, env=environment, cwd=scratch / "checkout", text=True, capture_output=True
        )
        print(f"    {'done' if done.returncode == 0 else f'EXIT CODE {done.returncode}'}", end="")
        print(f" in {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            failed.append(script)
            print((done.stdout + done.stderr)[-3000:], flush=True)
    if not arguments.list:
        print(f"\n{len(failed)} blocks failed, in {(time.monotonic() - begun) / 60:.0f} minutes")
    if arguments.folder is None:
        shutil.rmtree(scratch)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
