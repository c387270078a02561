"""train.py in several real processes on this host, for the tests of what they do together."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time

from bitsperdim import metrics

TOY = pathlib.Path(__file__).parent
STEPS = 40
CHANGES = {"train.steps": STEPS, "train.save_every": 4, "train.evaluate_every": 20, "train.pictures_every": 40}


class Processes:
    """train.py in several processes that find each other; `before` is run in each of them first, `after` at the end."""

    def __init__(self, workdir, count=2, before="", after="", devices=1, config="", changes=None, flags=()):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        self._lines = [[] for _ in range(count)]
        body = "from bitsperdim import scripts\nscripts.train()"
        program = "\n".join(map(textwrap.dedent, (before, body, after)))
        changes = ({} if config else CHANGES) | (changes or {})
        flags = [*flags, f"--config={config or TOY / 'toy.py'}", f"--workdir={workdir}"]
        flags += [f"--config.{key}={value}" for key, value in changes.items()]
        # Compiled as in the process of the tests, so that bits can be compared.
        xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOY), *sys.path]), "XLA_FLAGS": xla}
        self.each = [
            subprocess.Popen(
                [sys.executable, "-c", program, *flags, f"--multihost=localhost:{port},{count},{index}"],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for index in range(count)
        ]
        self._threads = [
            threading.Thread(target=lambda i=i: self._lines[i].extend(iter(self.each[i].stderr.readline, "")))
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def said(self, index=0):
        return "".join(self._lines[index])

    def wait_for(self, pattern, index=0, seconds=300):
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said(index)):
            assert time.monotonic() < deadline and self.each[index].poll() is None, self.said(index)
            time.sleep(0.02)

    def codes(self, seconds=300):
        """The exit codes of all; those that last longer are killed."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.each:
                process.wait(max(deadline - time.monotonic(), 0.01))
        finally:
            for process, thread in zip(self.each, self._threads, strict=True):
                process.kill()
                process.wait()
                thread.join()
                process.stderr.close()
        return [process.returncode for process in self.each]


# Reading takes a while, so that a signal comes before the end.
READ_SLOWLY = """
    import time
    from bitsperdim import data

    make = data.train_batch
    data.train_batch = lambda *arguments: (time.sleep(0.05), make(*arguments))[1]
"""


def wait_for_checkpoint(workdir, step, seconds=60):
    """The first one that is committed at this step or later."""
    deadline = time.monotonic() + seconds
    while True:
        found = [int(path.parent.name) for path in workdir.glob("model/checkpoints/*/manifest.json")]
        if newer := [other for other in found if other >= step]:
            return min(newer)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(workdir, name="model"):
    found = metrics.read(workdir / name / metrics.FILE)
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]
