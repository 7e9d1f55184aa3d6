"""Who may write a folder: every owner that another process can meet, and what is done about it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from dalle.errors import UserError
from dalle.training import lock
from dalle.training.lock import FolderLock, Owner, owner_in, start_of, this_machine

ELSEWHERE = {"host": "node7", "machine": "another boot pid:[1]"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def take(tmp_path, said):
    """``take()``: a lock on the folder, given back at the end."""
    held = []

    def acquire() -> FolderLock:
        held.append(FolderLock(tmp_path, said.append))
        held[-1].acquire()
        return held[-1]

    yield acquire
    for one in held:
        one.release()


def leave(folder, age: float = 0.0, **changes) -> Owner:
    """Another's lock, whose last sign of life is ``age`` seconds old."""
    owner = replace(Owner.here(), **changes)
    (folder / "lock").write_text(json.dumps(asdict(owner)))
    now = time.time()
    os.utime(folder / "lock", (now - age, now - age))
    return owner


def a_process_that_ended() -> tuple[int, float]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(process.pid)
    process.communicate(b"\n")
    return process.pid, started


def test_a_second_process_is_refused_by_host_and_process_and_the_first_keeps_the_folder(take, tmp_path):
    first = take()
    with pytest.raises(UserError, match=rf"already running, process {os.getpid()} on {socket.gethostname()}, last sign "
                                        r"of life \d{4}-.*delete .*lock"):
        take()
    assert owner_in((tmp_path / "lock").read_text()) == first.owner
    first.release()
    assert list(tmp_path.iterdir()) == []
    take()


def test_a_process_of_this_machine_that_ended_is_replaced_at_once(take, tmp_path, said, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1e6)
    pid, started = a_process_that_ended()
    leave(tmp_path, pid=pid, started=started)
    take()
    assert len(said) == 1 and f"process {pid}" in said[0]


def test_a_process_number_that_another_has_now_holds_nothing(take, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1e6)
    leave(tmp_path, started=start_of(os.getpid()) - 1)
    take()


def test_a_process_of_another_machine_that_still_gives_signs_is_refused(take, tmp_path, said, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1e6)
    leave(tmp_path, **ELSEWHERE)
    beating = threading.Timer(0.1, lambda: os.utime(tmp_path / "lock", (time.time() + 9, time.time() + 9)))
    beating.start()
    with pytest.raises(UserError, match="on node7"):
        take()
    beating.join()
    assert "waiting up to" in said[0]


def test_a_process_of_another_machine_is_dead_after_a_silence(take, tmp_path, said):
    leave(tmp_path, **ELSEWHERE)
    take()
    assert "waiting up to" in said[0] and "gave no sign of life" in said[1]


def test_a_silence_that_is_long_already_costs_no_wait(take, tmp_path, said, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 100)
    leave(tmp_path, age=1000, **ELSEWHERE)
    take()
    assert len(said) == 1 and "took over" in said[0]


@pytest.mark.parametrize("container", ["pid:[77]", "pid:[78]"])
def test_a_process_number_of_another_container_says_nothing(take, tmp_path, said, container):
    leave(tmp_path, machine=f"{this_machine().split()[0]} {container}")
    take()
    assert "waiting up to" in said[0]


@pytest.mark.parametrize(("restarts", "job", "at_once"), [("1", "5@c", True), ("0", "5@c", False), ("1", "6@c", False)])
def test_a_job_that_slurm_started_anew_takes_over_at_once(take, tmp_path, said, monkeypatch, restarts, job, at_once):
    number, _, cluster = job.partition("@")
    monkeypatch.setenv("SLURM_JOB_ID", number)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    leave(tmp_path, **ELSEWHERE, job="5@c", restarts=0)
    take()
    assert ("waiting up to" in said[0]) != at_once


def test_a_requeued_job_does_not_wait_for_a_process_that_slurm_gave_up_and_that_one_ends(take, tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(FolderLock, "_end", lambda self: ended.set())
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = take()
    assert ended.wait(30) and owner_in((tmp_path / "lock").read_text()) == second.owner


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00" * 40])
def test_a_damaged_lock_is_waited_for_and_replaced(take, tmp_path, said, text):
    (tmp_path / "lock").write_text(text)
    take()
    assert "a process without a name" in said[0]


def test_the_owner_gives_signs_of_life(take, tmp_path):
    take()
    path = tmp_path / "lock"
    os.utime(path, (1, 1))
    end = time.monotonic() + 30
    while path.stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1


def test_a_lock_that_someone_deleted_is_made_again(take, tmp_path):
    owner = take().owner
    (tmp_path / "lock").unlink()
    end = time.monotonic() + 30
    while not (tmp_path / "lock").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert owner_in((tmp_path / "lock").read_text()) == owner


def test_an_owner_that_was_replaced_ends_and_leaves_the_lock(take, tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(FolderLock, "_end", lambda self: ended.set())
    first = take()
    other = leave(tmp_path, token="another", **ELSEWHERE)
    assert ended.wait(30)
    first.release()
    assert owner_in((tmp_path / "lock").read_text()) == other
    (tmp_path / "lock").unlink()


def test_of_many_that_start_at_once_beside_a_dead_one_only_one_gets_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 60)
    pid, started = a_process_that_ended()
    leave(tmp_path, pid=pid, started=started)
    got, refused, barrier = [], [], threading.Barrier(8)

    def start() -> None:
        one = FolderLock(tmp_path, lambda line: None)
        barrier.wait()
        try:
            one.acquire()
            got.append(one)
        except UserError:
            refused.append(one)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_a_file_system_without_links_has_locks_too(take, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    first = take()
    assert owner_in((tmp_path / "lock").read_text()) == first.owner
    with pytest.raises(UserError, match="already running"):
        take()
