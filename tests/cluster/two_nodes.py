"""A real SLURM of two nodes on this one machine: munge, a controller and two node daemons of its own, on loopback.

The nodes are called by addresses, because every name that SLURM gives a node has to resolve for the processes on it.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("127.0.0.11", "127.0.0.12")
PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm",
            "srun": "slurm-wlm", "scancel": "slurm-wlm", "scontrol": "slurm-wlm"}
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# two clusters on one machine must not have jobs of the same number: a job's port comes from it
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits as long as a credential lives
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=20
MessageTimeout=10
SlurmctldTimeout=20
SlurmdTimeout=15
TCPTimeout=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""


def missing() -> str | None:
    """What this machine lacks to run a cluster, and the command that brings it."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        packages = " ".join(dict.fromkeys(PROGRAMS[name] for name in absent))
        return (f"no {', '.join(absent)} on this machine; as root: "
                f"apt-get update && apt-get install -y --no-install-recommends {packages}")
    if os.geteuid() != 0:
        return "SLURM's node daemons need root; run the tests in a container as root"
    return None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """Two nodes, up while the context is open; commands that are to meet them take ``environment``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf"),
                            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            folder=self.folder, host=socket.gethostname().split(".")[0], nodes=NODES, ports=free_ports(3),
            first_job=1000 + secrets.randbelow(18_000)))
        # nothing here uses control groups, yet a node daemon that is left to guess which there are refuses to start
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(1024))
        try:
            self._start("munged", "--foreground", "--force", *(
                f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")),
                f"--socket={self.folder}/munge.socket")
            self._await("munge's socket", 10, (self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-c")
            for name in NODES:
                self.start_node(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError, AssertionError):
            self.call("scancel", "--user", "root")
            self._await("the last job's end", 15, lambda: not self.call("squeue", "--noheader").strip())
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        self._kill(self._processes())

    # -- nodes

    def start_node(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", name, log=name)
        self._await(f"node {name}", 30, lambda: "State=IDLE" in self.call("scontrol", "show", "node", name).split())

    def kill_tasks(self, name: str) -> None:
        """End a node's part of the running job by SIGKILL."""
        self._kill(self._processes(name))

    def kill_node(self, name: str) -> None:
        """End all that runs on the node by SIGKILL, its daemon first: what is left is what a power cut leaves."""
        daemon = self.daemons.pop(f"slurmd {name}")
        daemon.kill()
        daemon.wait()
        tasks = self._processes(name)
        shepherds = {process for task in tasks for process in task.parents() if process.name() == "slurmstepd"}
        self._kill([*shepherds, *tasks])

    # -- jobs

    def call(self, *command: str, timeout: float = 30) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What SLURM says of a job: JobState, ExitCode, Restarts, NodeList..."""
        text = self.call("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def await_end(self, number: int, seconds: float) -> dict[str, str]:
        """The job, once it is over and SLURM has cleaned up after it."""
        self._await(f"the end of job {number}", seconds, lambda: self.job(number)["JobState"] in OVER)
        return self.job(number)

    def await_requeue(self, number: int, restarts: int, seconds: float) -> None:
        """Until SLURM has put the job back into its queue for the ``restarts``-th time."""
        self._await(f"restart {restarts} of job {number}", seconds,
                    lambda: self.job(number)["Restarts"] == str(restarts))

    def ranks(self) -> dict[str, set[int]]:
        """Which tasks of the running job's step each node has at the moment."""
        found: dict[str, set[int]] = {name: set() for name in NODES}
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "SLURM_STEP_ID" in environment:
                    found[environment["SLURMD_NODENAME"]].add(int(environment["SLURM_PROCID"]))
        return found

    # -- inside

    def _start(self, program: str, *arguments: str, log: str | None = None) -> None:
        output = (self.folder / f"{log or program}.out").open("ab")
        self.daemons[f"{program} {log}" if log else program] = subprocess.Popen(
            [shutil.which(program, path=SEARCH), *arguments], env=self.environment, cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        output.close()

    def _await(self, what: str, seconds: float, is_true: Callable[[], bool]) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{', '.join(dead)} ended: see {self.folder}"
            with contextlib.suppress(AssertionError):
                if is_true():
                    return
            time.sleep(0.2)
        raise AssertionError(f"{what} did not come within {seconds} s: see {self.folder}")

    def _processes(self, node: str | None = None) -> list[psutil.Process]:
        """This cluster's job processes, on one node or on both, by the environment that SLURM gave them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if (environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                        and environment.get("SLURMD_NODENAME") in ([node] if node else NODES)):
                    found.append(process)
        return found

    @staticmethod
    def _kill(processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
