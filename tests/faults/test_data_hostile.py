"""Hostile data: pickles, shell commands, control characters and paths in shards and specs do nothing.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import json
import logging
import pickle
from pathlib import Path

import pytest
from epochs import GOOD, delivered, files_below, one_epoch, one_line, sample_of
from payloads import Payload
from tiny_shards import sample_key, write_job, write_shards, write_tar


def test_pickle_inside_a_shard_is_never_read(tmp_path, run_here):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    first = dict.fromkeys(("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls"), payload)
    damage = {(0, 0): first, (1, 1): {"png": payload}, (2, 2): {"txt": payload}, (3, 3): {"json": payload}}
    extra = {4: [(f"x.{extension}", payload) for extension in first]}
    shards = write_shards(tmp_path / "shards", damage=damage, extra=extra, index=False)
    assert run_here("index_shards", shards, "--workers", 1).status == 0
    keys, skipped = one_epoch(shards)
    assert set(keys) == GOOD - {sample_key(shard, shard) for shard in (1, 2)}         # a JSON is not needed
    assert skipped == {"not_an_image": 1, "caption_encoding": 1}
    streamed, skipped_in_stream = one_epoch(shards, tier="sequential")
    assert set(streamed) == set(keys) and skipped_in_stream == skipped
    assert run_here("train", write_job(tmp_path, shards).config).status == 0
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()                           # the payload was live


@pytest.mark.parametrize("spec", ["pipe:touch {}", "{shards}::pipe:touch {}", "PIPE: touch {}", "pipe:touch {};.tar"])
def test_pipe_in_the_data_spec_is_refused_and_not_run(tmp_path, run_here, spec):
    marker = tmp_path / "executed"
    shards = write_shards(tmp_path / "shards", counts=(4,))
    spec = spec.format(marker, shards=shards)
    job = write_job(tmp_path, shards)
    for tier in ("exact", "resampled", "sequential"):
        ended = run_here("train", job.config, f"data.train={json.dumps(spec)}", f"data.tier={tier}")
        one_line(ended, "touch")
    ended = run_here("train", job.config, f"data.validation={json.dumps(spec)}", "train.validate_every=1")
    one_line(ended, "touch")
    one_line(run_here("index_shards", spec, "--workers", 1))
    assert not marker.exists()
    if spec.lower().startswith("pipe:"):
        allowed = run_here("train", job.config, f"data.train={json.dumps(spec)}", "data.tier=sequential",
                           "data.allow_pipe=true", "data.read_retries=0", "--resume", "none")
        assert allowed.status == 2 and marker.exists()          # only the flag runs it (and it writes no tar)


def test_control_characters_in_a_key_never_reach_the_log(tmp_path, caplog):
    good, bad = "a\nerror: nothing is wrong", "b\x1b[2J"
    write_tar(tmp_path / "0.tar", [*sample_of(good, 1), (f"{bad}.png", b"?"), (f"{bad}.txt", b"?")])
    with caplog.at_level(logging.WARNING):
        ((key, _), (replaced, _)) = delivered(tmp_path)
    assert key == replaced and key.isprintable() and "nothing is wrong" in key
    assert any("not_an_image" in message for message in caplog.messages)
    assert all(message.isprintable() for message in caplog.messages)


def test_tar_path_traversal_every_command_writes_only_into_its_own_folder(tmp_path, run_here, monkeypatch):
    room = tmp_path / "a" / "b"
    absolute = tmp_path / "absolute"
    names = ["../../x", "../../../../etc/x", str(absolute / "x"), "..", "a/../../x", "./x", "~/x"]
    members = [member for shade, name in enumerate(names) for member in sample_of(name, shade)]
    members = [(name, b"../../caption" if name.endswith(".txt") else data) for name, data in members]
    shards = write_tar(room / "shards" / "0.tar", members).parent
    (room / "home").mkdir()
    monkeypatch.setenv("HOME", str(room / "home"))
    monkeypatch.chdir(room / "home")
    before = files_below(tmp_path)
    assert run_here("index_shards", shards, "--workers", 1).status == 0
    assert [key for key, _ in delivered(shards)] == [name for name in names if Path(name).name != ".."]
    job = write_job(room, shards, data={"validation": str(shards)},
                    settings={"batch_size": 2, "validate_every": 2, "preview_every": 2})
    assert run_here("train", job.config).status == 0
    tokens, codes = room / "tokenizer", room / "codes"
    assert run_here("train_tokenizer", shards, "--out", tokens, "--vocab-size", 260).status == 0
    assert run_here("cache_codes", "--codec", job.run, "--data", shards, "--out", codes).status == 0
    added = files_below(tmp_path) - before
    own = ("a/b/shards/index", "a/b/runs", "a/b/tokenizer", "a/b/codes", "a/b/job.yaml")
    assert added and all(name.startswith(own) for name in added), sorted(added)
    assert not any("caption" in name or name.endswith(("/x", "x.png", "x.txt")) for name in added)
