"""Thirty kills at random moments, of runs of one and of two processes in turn, and not a bit is lost."""

import random
import time

import pytest
from toy_processes import CHANGES, READ_SLOWLY, Processes, lines

from bitsperdim import trainer

KILLS = 30
SOAK = {"train.steps": 1500, "train.save_every": 7, "train.evaluate_every": 1500, "train.pictures_every": 1500}


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_bit(
    tmp_path, toy_config, sub_mesh, monkeypatch, saved_state, assert_same_bits
):
    moments, inside_a_save = random.Random(0), 0
    for _ in range(KILLS):
        # Two devices always, the sum of whose gradients is the same in either order: so in one process or in two.
        count = moments.choice([1, 1, 2])
        processes = Processes(tmp_path / "killed", count, READ_SLOWLY, devices=2 // count, changes=SOAK)
        processes.wait_for(r"step \d+/")
        time.sleep(moments.uniform(0.0, 1.5))
        victim = processes.each[moments.randrange(count)]
        assert victim.poll() is None, "the run ended before it was killed often enough: give it more steps"
        victim.kill()
        assert 0 not in processes.codes(60)
        folders = (tmp_path / "killed/model/checkpoints").glob("*")
        inside_a_save += any(not (folder / "manifest.json").exists() for folder in folders)
    ended = Processes(tmp_path / "killed", 2, changes=SOAK)
    assert ended.codes() == [0, 0], ended.said()
    monkeypatch.setattr(trainer.sharding, "make_mesh", lambda config: sub_mesh(2))
    trainer.train(toy_config(CHANGES | SOAK), str(tmp_path / "unbroken"))
    assert_same_bits(saved_state(tmp_path / "killed"), saved_state(tmp_path / "unbroken"))
    assert lines(tmp_path / "killed") == lines(tmp_path / "unbroken")
    assert inside_a_save, "no kill fell into a save"
    print(f"{KILLS} kills, {inside_a_save} of them inside a save: every array and every logged figure has equal bits")
