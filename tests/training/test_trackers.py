import json
import logging

import numpy as np
from PIL import Image

from dalle.training.trackers import JsonlTracker, LogConfig, Trackers


class Broken:
    def log(self, step, values):
        raise ConnectionError("no route")

    images = log

    def close(self):
        raise AssertionError("a dropped tracker is not closed")


def test_the_jsonl_goes_on_when_other_trackers_fail_in_any_way(tmp_path, caplog):
    def unreachable():
        raise OSError("no server")

    trackers = Trackers([unreachable, Broken, lambda: JsonlTracker(tmp_path)])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            trackers.log(step, {"loss": 1.5, "bad": float("nan")})
        trackers.images(2, {"grid": np.zeros((4, 6, 3), np.uint8)})
        trackers.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 1.5, "bad": None} for step in range(3)]
    assert Image.open(tmp_path / "samples" / "step_00000002_grid.png").size == (6, 4)
    assert len([record for record in caplog.records if "off for the rest" in record.message]) == 2


def test_tensorboard_writes_event_files(tmp_path):
    trackers = Trackers.of_run(tmp_path, LogConfig(tensorboard=True), "run", {})
    trackers.log(1, {"loss": 1.0, "event": "start"})
    trackers.images(1, {"grid": np.zeros((4, 6, 3), np.uint8)})
    trackers.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_wandb_offline_keeps_one_id_over_two_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    identities = []
    for step in (1, 2):
        trackers = Trackers.of_run(tmp_path, LogConfig(wandb="offline"), "run", {"seed": 0})
        trackers.log(step, {"loss": 1.0})
        trackers.images(step, {"grid": np.zeros((4, 6, 3), np.uint8)})
        trackers.close()
        identities.append((tmp_path / "wandb_id").read_text())
    assert identities[0] == identities[1]
    folders = list((tmp_path / "wandb").glob(f"offline-run-*-{identities[0].strip()}"))
    assert len(folders) >= 1
