"""Processes that meet: here as threads, each with a store of its own over real sockets."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launching import free_port

from dalle.errors import LostProcess, UserError
from dalle.training.engines import meeting
from dalle.training.engines.meeting import meet


@pytest.fixture
def place(monkeypatch) -> str:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return f"127.0.0.1:{port}"


def test_all_that_come_meet_whoever_is_first(place):
    stores = {}
    threads = [threading.Thread(target=lambda rank=rank: stores.update({rank: meet(rank, 3, 60)}))
               for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stores.keys() == {0, 1, 2}


def test_rank_0_names_who_is_missing_while_it_waits_and_when_it_gives_up(place, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_IN_SILENCE", 0.2)
    said = []
    with pytest.raises(LostProcess, match=f"ranks 1, 2 of 3 at {place} did not come within 0.01.* minutes"):
        meet(0, 3, 1.0, said.append)
    assert said == [f"waiting for ranks 1, 2 of 3 at {place}"]


def test_another_rank_names_the_place_where_nobody_answers(place, monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS_IN_SILENCE", 0.2)
    said = []
    with pytest.raises(LostProcess, match=f"rank 0 of 2 at {place} .*refused.* did not come"):
        meet(1, 2, 1.0, said.append)
    assert said == [f"waiting for rank 0 of 2 at {place} (Connection refused)"]


def test_a_port_that_is_taken_is_one_line(place):
    with socket.socket() as other:
        other.bind(("0.0.0.0", int(os.environ["MASTER_PORT"])))
        other.listen()
        with pytest.raises(UserError, match="set a port that is free") as caught:
            meet(0, 2, 5)
    assert "\n" not in str(caught.value)


def test_under_torchrun_there_is_nobody_to_wait_for(place, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert meet(0, 2, 0) is None
