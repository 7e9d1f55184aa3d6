"""Where figures and pictures go: JSONL in the run folder always, TensorBoard and wandb by config.

Each destination has a thread and a queue of its own: the step waits for no disk and no network, and one destination
that fails, hangs or falls behind touches neither the run nor the others. The JSONL is the log of record: none of its
lines is ever given up. The others may lose lines, counted, with a warning.
"""

import json
import logging
import math
import os
import queue
import re
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
from PIL import Image

from dalle.training.settings import LogConfig

log = logging.getLogger(__name__)

CLOSE_SECONDS = 20              # for all of them together; a scheduler's SIGTERM leaves 30
MOST_LINES_WAITING = 10_000     # some 20 MB
MOST_PICTURES_WAITING = 16
PROBE_SECONDS = 5
WANDB_INIT_SECONDS = 60
WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
Images = Mapping[str, np.ndarray]      # name -> uint8 [H, W, 3]


class Tracker(Protocol):
    """One destination; used from its own thread only."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def images(self, step: int, images: Images) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """``log.jsonl``, the log of record: one JSON object a line (a figure that is not finite is null), and PNGs.

    :mod:`dalle.training.run_log` reads it.

    What a full disk does not take is kept, to the byte, and written before the next line; half a line that a kill left
    at the end of the file is cut off.
    """

    def __init__(self, folder: Path):
        self._path, self._samples = folder / "log.jsonl", folder / "samples"
        self._file: int | None = None
        self._waiting = b""
        self._failures = 0

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        self._waiting += json.dumps({"step": step, **finite}, default=str).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self._failures += 1
            if self._failures == 1 or self._failures % 100 == 0:
                log.error("%s CANNOT BE WRITTEN (%s): training goes on, %d lines wait in memory; make room", self._path,
                          error.strerror or error, self._waiting.count(b"\n"))
        else:
            if self._failures:
                log.warning("%s is written again, nothing is missing in it", self._path)
            self._failures = 0

    def _write(self) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            cut_torn_line(self._file)
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting):]

    def images(self, step: int, images: Images) -> None:
        try:
            self._samples.mkdir(exist_ok=True)
            for name, pixels in images.items():
                Image.fromarray(pixels).save(self._samples / f"step_{step:08d}_{name}.png")
        except OSError as error:
            log.error("the pictures of step %d cannot be written into %s (%s): training goes on without them", step,
                      self._samples, error.strerror or error)

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            log.error("%s: %d lines are lost, it could not be written to the end (%s)", self._path,
                      self._waiting.count(b"\n"), error.strerror or error)
        finally:
            if self._file is not None:
                os.close(self._file)


def cut_torn_line(file: int) -> None:
    """Shorten the open file to its last whole line."""
    size = os.fstat(file).st_size
    tail = os.pread(file, min(size, 1 << 20), max(0, size - (1 << 20)))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(file, size - len(tail) + tail.rfind(b"\n") + 1)


class TensorBoardTracker:
    """Event files in ``tensorboard/``. What was shown of the steps after ``done`` is void: they come again."""

    def __init__(self, folder: Path, send_images: bool, done: int):
        self._folder, self._send_images = str(folder / "tensorboard"), send_images
        self._open(done)

    def _open(self, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=done + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if values.get("event") == "rollback":
            self._writer.close()
            self._open(values["to_step"])
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, step)

    def images(self, step: int, images: Images) -> None:
        if self._send_images:
            for name, pixels in images.items():
                self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One wandb run, continued by the id in the run folder; offline where the server cannot be reached."""

    def __init__(self, folder: Path, config: LogConfig, name: str, settings: Mapping[str, Any]):
        import wandb

        self._wandb, self._send_images = wandb, config.images
        # console: wandb would send every printed line through the process that may hang
        options = {"project": config.wandb_project, "entity": config.wandb_entity, "tags": list(config.wandb_tags),
                   "name": name, "id": wandb_id(folder), "resume": "allow", "dir": str(folder),
                   "config": dict(settings),
                   "settings": wandb.Settings(init_timeout=WANDB_INIT_SECONDS, console="off")}
        if config.wandb == "offline":
            self._run = wandb.init(mode="offline", **options)
        else:
            self._run = self._start_online(options)
        # wandb drops its own steps when they repeat after a resume; ours are a figure like the others
        self._run.define_metric("*", step_metric="global_step")

    def _start_online(self, options: dict[str, Any]) -> Any:
        """A run on the server or, where that fails, an offline one."""
        try:
            fault = find_no_server(self._wandb.setup().settings)
            if fault is None:
                return self._wandb.init(mode="online", **options)
        except Exception as error:
            fault = error
        log.warning("wandb cannot be reached (%s): logging offline, send it later with `wandb sync`", fault)
        self._wandb.teardown()       # the failed start still holds the run's id
        return self._wandb.init(mode="offline", **options)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._run.log({"global_step": step, **figures})

    def images(self, step: int, images: Images) -> None:
        if self._send_images:
            pictures = {f"samples/{name}": self._wandb.Image(pixels) for name, pixels in images.items()}
            self._run.log({"global_step": step, **pictures})

    def close(self) -> None:
        self._run.finish()


def wandb_id(folder: Path) -> str:
    """The id of the folder's wandb run, made at the first start; one that is no id is replaced."""
    path = folder / "wandb_id"
    try:
        identity = path.read_text(encoding="utf-8").strip()
        if WANDB_ID.fullmatch(identity):
            return identity
        log.warning("%s holds no wandb id: the figures go to a new wandb run", path)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s): the figures go to a new wandb run", path, error)
    identity = secrets.token_hex(4)
    path.write_text(identity + "\n", encoding="utf-8")
    return identity


def find_no_server(settings: Any) -> OSError | None:
    """Why no connection to wandb's server can be opened, or None; wandb itself would try for a minute."""
    url = str(settings.base_url)
    if not url.startswith(("http://", "https://")) or settings.http_proxy or settings.https_proxy:
        return None
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return reason if isinstance(reason, (ConnectionError, TimeoutError, socket.gaierror)) else None
    except Exception:           # an answer that is no HTTP: wandb may know better
        return None
    return None


def kill_wandb_service() -> None:
    """End the process that wandb started for this one; it would hold up the exit. Its offline file can be synced."""
    for child in psutil.Process().children():
        if child.name().startswith("wandb"):
            for process in [*child.children(recursive=True), child]:
                process.kill()
    # wandb's own hook at exit would print a traceback about the process that is gone; this takes it off
    ending = threading.Thread(target=_tear_wandb_down, name="wandb teardown", daemon=True)
    ending.start()
    ending.join(2)


def _tear_wandb_down() -> None:
    import wandb

    with suppress(Exception):
        wandb.teardown()


class Destination:
    """One tracker with a thread and a queue of its own."""

    def __init__(self, name: str, make: Callable[[], Tracker], lossless: bool = False,
                 abandon: Callable[[], None] = lambda: None):
        """``make`` runs in the thread, so a slow server delays nothing; ``abandon`` frees the exit of what hangs.

        A ``lossless`` destination takes every line and goes on after an error; any other is off after its first.
        """
        self.name, self.abandon = name, abandon
        self._make, self._lossless = make, lossless
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._off = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, kind: Literal["log", "images"], step: int, payload: Mapping[str, Any]) -> None:
        """Queue figures or pictures; never waits."""
        if self._off or not self._has_room(kind):
            return
        self._queue.put((kind, step, payload))

    def _has_room(self, kind: str) -> bool:
        if kind == "log" and self._lossless:
            return True
        if self._queue.qsize() < (MOST_LINES_WAITING if kind == "log" else MOST_PICTURES_WAITING):
            return True
        self._dropped += 1
        if self._dropped == 1 or self._dropped % 1000 == 0:
            log.warning("%s does not keep up: %d entries dropped so far", self.name, self._dropped)
        return False

    def end(self) -> None:
        """Ask the thread to finish what is queued and close."""
        self._queue.put(None)

    def ended(self, seconds: float) -> bool:
        """Wait so long for the end; whether it came. What was dropped is said."""
        self._thread.join(max(0.0, seconds))
        if self._dropped:
            log.warning("%s: %d entries were dropped in all, log.jsonl has their figures", self.name, self._dropped)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def _write(self) -> None:
        try:
            tracker = self._make()
            while (item := self._queue.get()) is not None:
                kind, step, payload = item
                try:
                    (tracker.log if kind == "log" else tracker.images)(step, payload)
                except Exception as error:
                    if not self._lossless:
                        raise
                    log.error("%s: an entry of step %d could not be written: %s: %s", self.name, step,
                              type(error).__name__, error)
            tracker.close()
        except Exception as error:
            self._off = True
            log.warning("%s failed and is off for the rest of this run: %s: %s", self.name, type(error).__name__, error)


class Trackers:
    """All destinations of one run: ``log.jsonl`` in ``folder``, and others by name."""

    def __init__(self, folder: Path, others: Sequence[Destination] = ()):
        self._destinations = [Destination("log.jsonl", lambda: JsonlTracker(folder), lossless=True), *others]

    @classmethod
    def of_run(cls, folder: Path, config: LogConfig, name: str, settings: Mapping[str, Any],
               done: int = 0) -> "Trackers":
        """The trackers that ``config`` asks for, of a run that goes on after ``done`` steps."""
        others = []
        if config.tensorboard:
            others.append(Destination("TensorBoard", lambda: TensorBoardTracker(folder, config.images, done)))
        if config.wandb != "disabled":
            others.append(Destination("wandb", lambda: WandbTracker(folder, config, name, settings),
                                      abandon=kill_wandb_service))
        return cls(folder, others)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for destination in self._destinations:
            destination.put("log", step, values)

    def images(self, step: int, images: Images) -> None:
        for destination in self._destinations:
            destination.put("images", step, images)

    def close(self) -> None:
        """Write what is queued and end; what hangs is left behind after a while, so that the process can exit."""
        for destination in self._destinations:
            destination.end()
        deadline = time.monotonic() + CLOSE_SECONDS
        for destination in self._destinations:
            if not destination.ended(deadline - time.monotonic()):
                log.warning("%s did not finish within %g s and is left behind, with %d entries unwritten",
                            destination.name, CLOSE_SECONDS, destination.waiting)
                destination.abandon()
