"""What devices send each other: gradients, weights and the sums of `step_collectives.SUMS`, never activations."""

import os
import subprocess
import sys

import pytest
import step_collectives


def test_a_step_of_an_autoencoder_sends_what_its_table_says():
    print(step_collectives.check(("vqvae2_photos", "autoencoder"), 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 64])
def test_a_step_of_every_stage_sends_what_its_table_says_replicated_and_sharded(count):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, step_collectives.__file__, str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2 * len(step_collectives.SUMS)
