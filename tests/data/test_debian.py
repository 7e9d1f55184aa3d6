"""Installing Debian packages beside another process that holds apt's or dpkg's lock."""

import shutil
import subprocess
import sys

import pytest

from dalle.data import debian
from dalle.errors import UserError

LISTS_LOCKED = ("E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)\n"
                "E: Unable to lock directory /var/lib/apt/lists/\n")


class Answers(list):
    """(status, what it says on stderr) for each call of apt-get to come, then (0, ""); the commands as ``seen``."""

    def __init__(self):
        super().__init__()
        self.seen: list[list[str]] = []


@pytest.fixture
def answers(monkeypatch) -> Answers:
    """What a stand-in for apt-get answers."""

    waiting = Answers()

    def run(command, **options):
        waiting.seen.append(command)
        status, said = waiting.pop(0) if waiting else (0, "")
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(debian.subprocess, "run", run)
    monkeypatch.setattr(debian.time, "sleep", lambda seconds: None)
    return waiting


def silent(line: str) -> None:
    pass


def test_it_updates_and_installs_waiting_for_dpkgs_lock(answers):
    debian.install(["one", "two"], silent)
    assert [command[:3] for command in answers.seen] == 2 * [["apt-get", "-o", "DPkg::Lock::Timeout=600"]]
    assert answers.seen[0][3] == "update"
    assert answers.seen[1][3] == "install" and answers.seen[1][-2:] == ["one", "two"]


def test_a_lock_that_apt_does_not_wait_for_is_tried_again_and_said_once(answers):
    answers += 3 * [(100, LISTS_LOCKED)]
    said = []
    debian.install(["one"], said.append)
    assert [command[3] for command in answers.seen] == 4 * ["update"] + ["install"]
    assert len(said) == 2 and "held by process 7" in said[1]


def test_a_lock_that_stays_ends_in_one_line(answers, monkeypatch):
    monkeypatch.setattr(debian, "LOCK_SECONDS", 0)
    answers.append((100, LISTS_LOCKED))
    with pytest.raises(UserError, match="update -qq failed: E: Unable to lock"):
        debian.install(["one"], silent)


def test_another_failure_says_why_at_once(answers):
    answers.append((100, "E: one\nE: no network\n"))
    with pytest.raises(UserError, match="no network"):
        debian.install(["one"], silent)
    assert len(answers.seen) == 1


def test_a_system_without_apt_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert debian.missing(["one"]) == ["one"]
    with pytest.raises(UserError, match="there is no apt-get here"):
        debian.install(["one"], silent)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_update_waits_until_another_process_lets_go_of_the_lists(tmp_path, monkeypatch):
    (tmp_path / "partial").mkdir()
    monkeypatch.setattr(debian, "LOCK_PAUSE", 0.05)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    said = []

    def let_go(line: str) -> None:
        said.append(line)
        holder.communicate()

    own = (f"State::Lists={tmp_path}", "Etc::SourceList=/dev/null", "Etc::SourceParts=/dev/null")
    debian.apt_get(["update", "-qq", *(f"-oDir::{place}" for place in own)], let_go)
    assert len(said) == 1 and str(tmp_path / "lock") in said[0]


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""
