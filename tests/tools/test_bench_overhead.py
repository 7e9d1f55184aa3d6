import re
import time

import pytest
import torch

from dalle.training import loop, saving
from tests.conftest import Command

overhead = Command("tools/bench/overhead.py")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def delayed(function, seconds):
    def slow(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return slow


def test_slow_writing_is_found_in_the_blocks_with_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "write_tensors", delayed(saving.write_tensors, 0.2))     # three files a save
    assert overhead("checkpoint", "--tiny", "--rounds", 1, "--save-every", 2, "--threads", 1, "--precision", "fp32",
                    "--folder", tmp_path) == 0
    out = capsys.readouterr().out
    step = {mode: float(number) for mode, number in re.findall(r"^  (.+?) +([\d.]+) ms a step", out, re.MULTILINE)}
    assert step.keys() == {"no save", "asynchronous", "synchronous"}
    assert min(step["asynchronous"], step["synchronous"]) >= 300 > step["no save"]
    assert float(re.search(r"asynchronous / no save: ([\d.]+)", out)[1]) < 0.9
    assert [float(number) >= 0.6 for number in re.findall(r"writing ([\d.]+) s", out)] == [True, True]
    assert not list(tmp_path.iterdir())


def test_a_slow_loop_is_found_against_the_bare_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "seed_random", delayed(loop.seed_random, 0.02))            # twice a step
    assert overhead("step", "--tiny", "--rounds", 2, "--threads", 1, "--precision", "fp32", "--folder", tmp_path) == 0
    out = capsys.readouterr().out
    added = [float(number) for number in re.findall(r"the Trainer adds ([\d.]+) ms", out)]
    assert len(added) == 2 and min(added) >= 40
    assert all(float(number) > 1 for number in re.findall(r"Trainer / bare loop: ([\d.]+)", out))
