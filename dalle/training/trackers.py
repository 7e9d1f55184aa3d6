"""Where figures and pictures go: JSONL in the run folder always, TensorBoard and wandb by config.

Everything is written by one thread behind a queue, so the step does not wait for a disk or a network. A tracker that
fails is dropped with a warning; it cannot stop a run.
"""

import json
import logging
import math
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from dalle.config import Section

log = logging.getLogger(__name__)

WANDB_INIT_SECONDS = 60
CLOSE_SECONDS = 120


class LogConfig(Section):
    """Trackers beside the JSONL, which is always written."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    wandb_project: str = "tessera"
    wandb_entity: str | None = None
    wandb_tags: tuple[str, ...] = ()
    tensorboard: bool = False
    images: bool = Field(default=True, description="send previews to wandb and TensorBoard; PNGs are always written")


Images = Mapping[str, np.ndarray]      # name -> uint8 [H, W, 3]


class Tracker(Protocol):
    """One destination; used from the writing thread only."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def images(self, step: int, images: Images) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """``log.jsonl``, the log of record: one JSON object a line (a figure that is not finite is null), and PNGs."""

    def __init__(self, folder: Path):
        self._samples = folder / "samples"
        self._file = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def images(self, step: int, images: Images) -> None:
        self._samples.mkdir(exist_ok=True)
        for name, pixels in images.items():
            Image.fromarray(pixels).save(self._samples / f"step_{step:08d}_{name}.png")

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """Event files in ``tensorboard/``."""

    def __init__(self, folder: Path, send_images: bool):
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._send_images = SummaryWriter(str(folder / "tensorboard")), send_images

    def log(self, step: int, values: Mapping[str, Any]) -> None:
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
        id_file = folder / "wandb_id"
        identity = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        id_file.write_text(identity + "\n")
        options = {"project": config.wandb_project, "entity": config.wandb_entity, "tags": list(config.wandb_tags),
                   "name": name, "id": identity, "resume": "allow", "dir": str(folder), "config": dict(settings),
                   "settings": wandb.Settings(init_timeout=WANDB_INIT_SECONDS)}
        try:
            self._run = wandb.init(mode=config.wandb, **options)
        except Exception as error:
            if config.wandb == "offline":
                raise
            log.warning("wandb cannot be reached (%s): logging offline, send it later with `wandb sync`", error)
            self._run = wandb.init(mode="offline", **options)
        # wandb drops its own steps when they repeat after a resume; ours are a figure like the others
        self._run.define_metric("*", step_metric="global_step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._run.log({"global_step": step, **figures})

    def images(self, step: int, images: Images) -> None:
        if self._send_images:
            pictures = {f"samples/{name}": self._wandb.Image(pixels) for name, pixels in images.items()}
            self._run.log({"global_step": step, **pictures})

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All destinations of one run behind one queue."""

    def __init__(self, makers: Sequence[Callable[[], Tracker]]):
        """``makers`` build the trackers; they run in the writing thread, so a slow server delays nothing."""
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, args=(list(makers),), name="trackers", daemon=True)
        self._thread.start()

    @classmethod
    def of_run(cls, folder: Path, config: LogConfig, name: str, settings: Mapping[str, Any]) -> "Trackers":
        """The trackers that ``config`` asks for, the JSONL first."""
        makers: list[Callable[[], Tracker]] = [lambda: JsonlTracker(folder)]
        if config.tensorboard:
            makers.append(lambda: TensorBoardTracker(folder, config.images))
        if config.wandb != "disabled":
            makers.append(lambda: WandbTracker(folder, config, name, settings))
        return cls(makers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._queue.put(("log", step, values))

    def images(self, step: int, images: Images) -> None:
        self._queue.put(("images", step, images))

    def close(self) -> None:
        """Write what is queued and end; a tracker that hangs is left behind after a while."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("a tracker did not finish within %d s and is left behind", CLOSE_SECONDS)

    def _write(self, makers: list[Callable[[], Tracker]]) -> None:
        trackers = [tracker for make in makers if (tracker := _guarded(make, "starting a tracker")) is not False]
        while (item := self._queue.get()) is not None:
            kind, step, payload = item
            for tracker in list(trackers):
                action = getattr(tracker, kind)
                if _guarded(lambda: action(step, payload), type(tracker).__name__) is False:  # noqa: B023 (called now)
                    trackers.remove(tracker)
        for tracker in trackers:
            _guarded(tracker.close, type(tracker).__name__)


def _guarded(action: Callable[[], Any], name: str) -> Any:
    """What ``action`` returns, or False, with a warning, when it fails in whatever way."""
    try:
        return action()
    except Exception as error:
        log.warning("%s failed and is off for the rest of this run: %s: %s", name, type(error).__name__, error)
        return False
