"""The watchdog in a process of its own, which it ends."""

import os
import subprocess
import sys
from pathlib import Path

from dalle.errors import EXIT_LOST_PROCESS

ROOT = Path(__file__).resolve().parents[2]
FED_THEN_STUCK = """
import sys, time
from dalle.training.watchdog import Watchdog

def wait_for_the_others():
    time.sleep(60)

with Watchdog(3) as watchdog:
    for step in range(20):
        with watchdog.allow(1.0, step, "training"):        # fed: twenty short parts, together longer than one may be
            time.sleep(0.07)
    time.sleep(1.3)                                        # nothing is due between two parts
    print("alive", flush=True)
    with watchdog.allow(0.3, 20, "saving"):
        wait_for_the_others()
print("never")
"""


FED = """
import time
from dalle.training.watchdog import Watchdog

with Watchdog(0) as watchdog, watchdog.allow(1.0, 0, "validating"):
    for batch in range(20):
        watchdog.feed()
        time.sleep(0.07)
    print("alive", flush=True)
    time.sleep(60)
"""

STUCK_AND_UNHEARD = """
import os, time
from dalle.training.watchdog import Watchdog

reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(writing)
os.close(reading)                  # what becomes of stderr when its launcher is killed
with Watchdog(0) as watchdog, watchdog.allow(0.2, 0, "training"):
    time.sleep(60)
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)


def test_it_spares_a_process_that_moves_on_and_ends_one_that_hangs_with_its_stack():
    done = run(FED_THEN_STUCK)
    assert done.stdout == "alive\n" and done.returncode == EXIT_LOST_PROCESS
    first = done.stderr.splitlines()[0]
    for words in ("rank 3 on ", "step 20 has been saving for more than 0 s", "engine.step_timeout_minutes"):
        assert words in first
    assert "in wait_for_the_others" in done.stderr


def test_after_a_clean_exit_it_watches_no_more():
    done = run("import time\nfrom dalle.training.watchdog import Watchdog\n"
               "with Watchdog(0) as watchdog:\n    watchdog.allow(0.1, 0, 'starting').__enter__()\n"
               "time.sleep(0.6)\nprint('alive')")
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)


def test_being_fed_begins_the_time_anew():
    done = run(FED)
    assert done.stdout == "alive\n" and done.returncode == EXIT_LOST_PROCESS and "validating" in done.stderr


def test_it_ends_the_process_also_where_nobody_reads_its_words():
    assert run(STUCK_AND_UNHEARD).returncode == EXIT_LOST_PROCESS
