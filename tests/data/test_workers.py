"""Processes that make batches: whose forks they are, what they outlive, how their end is told."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from numbered import SIZE, config, png, take

from dalle.data.loader import train_batches
from dalle.data.settings import DataConfig
from dalle.data.writer import ShardWriter
from dalle.errors import LostProcess


def test_workers_and_what_starts_them_outlive_the_signals_of_the_job(data):
    loader = train_batches(config(data, workers=1), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    worker = loader._loader._iterator._workers[0]
    server = psutil.Process(worker.pid).parent()
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(worker.pid, name)
        server.send_signal(name)
    for _ in range(20):
        next(batches)
    assert worker.is_alive() and server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    loader.close()
    assert not worker.is_alive()


def test_workers_are_forks_of_a_process_with_one_thread_that_is_not_this_one(data):
    loader = train_batches(config(data, workers=2), seed=0, batch_size=2)
    next(iter(loader))
    (server,) = {psutil.Process(worker.pid).parent() for worker in loader._loader._iterator._workers}
    assert server.pid != os.getpid() and server.num_threads() == 1
    loader.close()


def test_workers_go_on_in_the_environment_and_folder_of_the_process(tmp_path, monkeypatch):
    for number in (1, 2):                             # the process that starts them is the same
        with ShardWriter(tmp_path / str(number) / "shards") as writer:
            writer.write(png(number), "png", ["a"])
        monkeypatch.chdir(tmp_path / str(number))
        monkeypatch.setenv("OF_THIS_TEST", f"0000{number - 1}")
        (tmp_path / str(number) / "shards" / "00000.tar").rename(f"shards/0000{number - 1}.tar")
        settings = DataConfig(train="pipe:cat shards/$OF_THIS_TEST.tar", tier="sequential", allow_pipe=True, workers=1,
                              image_size=SIZE)
        loader = train_batches(settings, seed=0, batch_size=1)
        assert take(loader, 1)[0]["image"][0, 0, 0, 0] == number
        loader.close()


TRAINER = """
import sys
from dalle.data.loader import train_batches
from dalle.data.settings import DataConfig

if __name__ == "__main__":
    loader = train_batches(DataConfig.model_validate_json(sys.argv[1]), seed=0, batch_size=2)
    for _ in loader:
        print("a batch", flush=True)
"""


@pytest.mark.parametrize("early", [False, True])
def test_all_processes_of_a_killed_trainer_end_without_a_word_on_its_semaphores(data, tmp_path, early):
    (tmp_path / "trainer.py").write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "trainer.py"),
                                config(data, workers=2).model_dump_json()],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        of_it = psutil.Process(trainer.pid)
        while early and len(of_it.children()) < 2:    # no worker yet
            time.sleep(0.01)
        assert early or trainer.stdout.readline() == "a batch\n"
        processes = of_it.children(recursive=True)
        assert len(processes) == (2 if early else 4), processes      # a fork server, a semaphore tracker, two workers
    finally:
        trainer.kill()
    _, left = psutil.wait_procs(processes, 120)        # the server when it has imported all
    assert not left and "resource_tracker" not in trainer.communicate()[1]


@pytest.mark.parametrize("waiting", [True, False])
def test_a_killed_worker_is_named_when_its_batch_is_asked_for_and_nowhere_else(data, waiting):
    loader = train_batches(config(data, workers=2), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    victim = loader._loader._iterator._workers[1]
    if waiting:
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGSTOP)      # so that the batches run out
        threading.Timer(0.3, os.kill, (victim.pid, signal.SIGKILL)).start()
    else:
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.3)
    began = time.monotonic()
    with pytest.raises(LostProcess, match=rf"worker 1 \(process {victim.pid}\) was killed by signal 9.*data\.workers"):
        take(batches, 50)
    assert time.monotonic() - began < 4
    if waiting:
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGCONT)
    loader.close()


def test_workers_without_the_process_that_starts_them_are_lost_and_the_next_loader_has_another(data):
    loader = train_batches(config(data, workers=1), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    psutil.Process(loader._loader._iterator._workers[0].pid).parent().kill()
    with pytest.raises(LostProcess, match=r"worker 0 \(process \d+\) was lost with the process that starts"):
        take(batches, 1000)
    loader.close()
    again = train_batches(config(data, workers=1), seed=0, batch_size=2)
    assert len(take(again, 2)) == 2
    again.close()
