"""The tiers without an index: what is found in a streamed shard, and the batches made of it."""

import contextlib
import itertools
import json
import os
import pickle
import re
import tarfile
from collections import Counter

import pytest
import torch
import yaml
from numbered import damaged_set, png
from pydantic import ValidationError
from streams import KEYS, PER_SHARD, batches_of, config, keys_in, write_tar

from dalle.data import streaming
from dalle.data.index import ShardIndex
from dalle.data.loader import train_batches, validation_batches
from dalle.data.opening import Patience, ShardStream
from dalle.data.reasons import Tally
from dalle.data.streaming import DamagedShard, drawn_shard, raw_samples
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

pytestmark = pytest.mark.usefixtures("short_pauses")

# --- what is in a shard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_stream_holds_the_samples_that_the_index_finds(tmp_path, format):
    long = "d/" + ("k" * 140 if format != tarfile.USTAR_FORMAT else "k" * 90)
    members = [("a.jpg", b"A" * 600), ("a.txt", b"a"), (f"{long}.png", b"B"), (f"{long}.json", b"{}"),
               ("README", b"x"), ("n.txt", b"alone"), ("a.jpg", b"again"), ("c.webp", b""), ("c.pkl", b"!"),
               ("._c.jpg", b"mac"), ("v.x.jpg", b"v"), ("../../up.jpg", b"up")]
    path = write_tar(tmp_path / "0.tar", members, format)
    index = ShardIndex.build([path])
    stream, problems = ShardStream(str(path), Patience(1, 0)), Tally()
    samples = list(raw_samples(stream, problems))
    stream.close()
    assert [sample.key for sample in samples] == index.members(0)["key"].tolist()
    contents = path.read_bytes()
    for sample, row in zip(samples, index.members(0), strict=True):
        for part in ("image", "text", "json"):
            offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
            assert sample.parts.get(part) == (contents[offset:offset + size] if size >= 0 else None)
    assert {**problems.counts, "no_caption": index.problems["no_caption"]} == index.problems


def test_what_lies_between_the_members_of_a_streamed_sample_does_not_part_them(tmp_path):
    between = [("._a.png", b"mac"), ("Thumbs.db", b"!"), ("README", b"")]
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), *between, ("a.txt", b"a caption")])
    batches, loader = batches_of(config(tmp_path), 1, batch_size=1)
    assert batches[0]["caption"] == ["a caption"] and not loader.skipped


def test_members_that_a_stream_cannot_join_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("b.png", png(2)), ("b.txt", b"b"), ("a.txt", b"a")])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 1, batch_size=2)
    assert keys_in(batches) == ["b", "b"] and loader.skipped["members_apart"] == 1


def test_every_cut_is_noticed_and_nothing_halved_is_delivered(streamed, tmp_path):
    whole = (streamed / "train" / "00000.tar").read_bytes()
    rows = ShardIndex.build([streamed / "train" / "00000.tar"]).members(0)
    row = rows[3]
    ends = sorted(int(row[f"{part}_offset"]) for part in ("image", "text", "json"))
    cuts = {"payload": ends[0] + 5, "header": ends[1] - 300, "between members": ends[1] - 512,
            "between samples": ends[0] - 512}
    for name, cut in cuts.items():
        path = tmp_path / "00000.tar"
        path.write_bytes(whole[:cut])
        keys = []
        with contextlib.closing(ShardStream(str(path), Patience(1, 0))) as stream, \
                pytest.raises(DamagedShard, match="truncated_shard"):
            for sample in raw_samples(stream, Tally()):
                keys.append(sample.key.decode())
        assert keys == KEYS[:2 if name == "between samples" else 3], name
        batches, loader = batches_of(config(tmp_path), 4)
        assert keys_in(batches) == [key for key, _ in zip(itertools.cycle(keys), range(12), strict=False)]
        assert loader.skipped["truncated_shard"] >= 2       # at every pass


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match="none of the shards .*no tar .*compressed ones are not read"):
        batches_of(config(tmp_path), 1)
    write_tar(tmp_path / "0.tar", [("a.txt", b"a")])
    with pytest.raises(UserError, match="no sample with a picture"):
        batches_of(config(tmp_path), 1)


def test_claims_of_size_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LARGEST_MEMBER", 2000)
    path = write_tar(tmp_path / "0.tar", [("big.png", bytes(5000)), ("big.txt", b"big"), ("a.png", png(1)),
                                          ("a.txt", b"a")])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 1, batch_size=2)
    assert keys_in(batches) == ["a", "a"] and loader.skipped["member_too_large"] == loader.skipped["no_image"] >= 1
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header))
    with pytest.raises(UserError, match="inside a member of 1152921504606846976 bytes"):
        batches_of(config(tmp_path), 1)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_pickles_in_a_shard_are_never_loaded(tmp_path, monkeypatch, tier):
    monkeypatch.chdir(tmp_path)
    poison = pickle.dumps(Payload())
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a"),
                                   *((f"a.{kind}", poison) for kind in ("pkl", "pickle", "pyd", "pth", "npy")),
                                   ("b.png", poison), ("b.txt", b"b"), ("c.png", png(2)), ("c.json", poison)])
    batches, _ = batches_of(config(tmp_path, tier=tier, max_bad_fraction=1), 4)
    assert set(keys_in(batches)) == {"a"} and not (tmp_path / "executed").exists()


# --- the batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_batches_are_as_in_the_exact_tier(streamed, tier):
    batches, loader = batches_of(config(streamed / "train", tier=tier), 12, start_step=5)
    exact, _ = batches_of(config(streamed / "train", tier="exact"), 1)
    for step, batch in enumerate(batches, start=5):
        assert batch.keys() == exact[0].keys()
        assert all(torch.is_tensor(value) == torch.is_tensor(exact[0][name]) for name, value in batch.items())
        assert batch["image"].shape == exact[0]["image"].shape and batch["image"].dtype == torch.uint8
        assert batch["position"].tolist() == [3 * step, 3 * step + 1, 3 * step + 2]
        for row, key in enumerate(batch["key"]):
            number = KEYS.index(key)
            assert batch["image"][row, 0].unique().tolist() == [number]
            assert batch["caption"][row] in (f"picture {number}", f"also {number}")
            assert batch["class_id"][row] == number % 3
    assert {caption.split()[0] for batch in batches for caption in batch["caption"]} == {"picture", "also"}
    assert pickle.loads(pickle.dumps(loader._loader.dataset)).urls == loader._loader.dataset.urls
    assert not loader.skipped and loader.index is None and set(loader.identity) == {"fingerprint"}


def test_sequential_is_pass_after_pass_in_order(streamed):
    assert keys_in(batches_of(config(streamed / "train"), 12)[0]) == 2 * KEYS
    resumed = keys_in(batches_of(config(streamed / "train"), 6, start_step=4)[0])
    assert sorted(resumed) == KEYS and resumed[0] in KEYS[::PER_SHARD]      # whole shards, from another one on


def test_resampled_repeats_with_the_seed_and_differs_without(streamed):
    settings = config(streamed / "train", tier="resampled", flip=True)
    first, second = (batches_of(settings, 20)[0] for _ in range(2))
    assert keys_in(first) == keys_in(second)
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(first, second, strict=True))
    others = [keys_in(batches_of(settings, 20, **change)[0])
              for change in ({"seed": 1}, {"start_step": 1}, {"rank": 1, "world_size": 3, "batch_size": 9})]
    assert all(keys != keys_in(first) for keys in others)
    assert keys_in(first) != (4 * KEYS)[:60] and set(keys_in(first)) == set(KEYS)


def test_draws_are_a_pure_function_and_even():
    draws = [drawn_shard(3, 7, 0, 1, draw, 10) for draw in range(3000)]
    assert draws == [drawn_shard(3, 7, 0, 1, draw, 10) for draw in range(3000)]
    assert all(230 < count < 370 for count in Counter(draws).values()) and len(set(draws)) == 10
    lanes = {tuple(drawn_shard(3, 7, rank, worker, draw, 10) for draw in range(20))
             for rank in range(2) for worker in range(3)}
    assert len(lanes) == 6


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_fewer_shards_than_workers_starve_nobody(streamed, tier):
    for rank in range(2):
        settings = config(streamed / "train", tier=tier, workers=2)
        batches, loader = batches_of(settings, 9, batch_size=4, rank=rank, world_size=2)
        assert [batch["position"].tolist() for batch in batches] == [[4 * step + rank, 4 * step + 2 + rank]
                                                                     for step in range(9)]
        assert not loader.skipped


def test_lanes_divide_shards_or_samples(streamed, tmp_path):
    def lanes(spec, world, count):
        parts = [batches_of(config(spec), count, batch_size=world, rank=rank, world_size=world)[0]
                 for rank in range(world)]
        return [keys_in(part) for part in parts]

    assert lanes(streamed / "train", 3, 6) == [KEYS[6 * lane:6 * lane + 6] for lane in range(3)]
    assert sorted(itertools.chain(*lanes(streamed / "train", 6, 3))) == KEYS
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a")])
    assert lanes(tmp_path, 4, 3) == [["a"] * 3] * 4
    os.link(streamed / "train" / "00001.tar", tmp_path / "1.tar")
    (tmp_path / "2.tar").write_bytes(b"")
    damaged = lanes(tmp_path, 3, 7)                         # the lane whose only shard is empty reads the others'
    assert set(damaged[2]) <= {"a", *KEYS} and len(damaged[2]) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_passed_over_counted_and_named(tmp_path, caplog, workers):
    settings = config(damaged_set(tmp_path / "d"), max_bad_fraction=0.3, workers=workers)
    batches, loader = batches_of(settings, 5)
    numbers = [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]
    assert numbers == [0, 1, 4, 5, 6, 7, *range(9, 18)]
    assert loader.skipped == {"truncated_image": 1, "not_an_image": 1, "empty_caption": 1}
    assert not any({"skipped", "read"} & batch.keys() for batch in batches)
    if not workers:
        assert re.search(r"passed over: not_an_image.* key 000000003, sample 3 of .*00000\.tar", caplog.text)


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_too_many_bad_samples_stop_the_run(tmp_path, tier):
    folder = damaged_set(tmp_path / "d")
    with pytest.raises(UserError, match=r"of \d+ samples in .*d/00000\.tar and 1 more cannot be used.*not_an_image"):
        batches_of(config(folder, tier=tier, max_bad_fraction=0.1), 200)
    with pytest.raises(UserError, match="no usable sample among 1000 in a row.*caption=none"):
        with ShardWriter(tmp_path / "blank", 4) as writer:
            for number in range(9):
                writer.write(png(number), "png", [""])
        batches_of(config(tmp_path / "blank", tier=tier), 1)


def test_members_missing_from_a_sample_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a"), ("b.txt", b"b"), ("c.png", png(3)),
                                   ("d.png", png(4)), ("d.json", b'{"caption": "d"}'), ("a.png", png(5))])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 2, batch_size=2)
    assert keys_in(batches) == ["a", "d", "a", "d"]
    assert loader.skipped == {"no_caption": 2, "no_image": 1, "duplicate_key": 1}


def test_cached_codes_need_the_exact_tier(streamed):
    with pytest.raises(ValidationError, match="codes belong to an index.*set tier to exact"):
        config(streamed / "train", codes="codes")


def test_validation_stays_exact(streamed):
    settings = config(streamed / "train", validation=str(streamed / "train"), tier="resampled")
    assert keys_in(validation_batches(settings, seed=0, batch_size=5)) == KEYS
    with pytest.raises(UserError, match="needs local tar files"):
        validation_batches(config(streamed / "train", validation="https://host/0.tar"), seed=0, batch_size=5)


def test_identity_follows_the_shards_and_not_their_place(streamed, server):
    def identity(spec):
        return train_batches(config(spec), seed=0, batch_size=3).identity

    assert identity(streamed / "train") == identity(server.url("{00000..00002}.tar?token=1"))
    assert identity(streamed / "train") != identity(f"{streamed}/train/{{00000..00001}}.tar")


def test_a_shard_whose_name_is_not_utf8_is_streamed(streamed, tmp_path):
    os.link(streamed / "train" / "00000.tar", os.fsencode(tmp_path) + b"/caf\xe9.tar")
    batches, loader = batches_of(config(tmp_path), 2)
    assert keys_in(batches) == KEYS[:6] and len(loader.identity["fingerprint"]) == 32


def test_a_run_trains_and_resumes_on_streams(workshop, commands, server, tmp_path):
    folder = workshop.folder / "data" / "train"
    server.files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    tree = yaml.safe_load(workshop.config("dvae", tmp_path).read_text())
    tree["data"] |= {"train": server.url("{00000..00002}.tar"), "tier": "resampled", "shuffle_buffer": 16}
    (tmp_path / "dvae.yaml").write_text(yaml.safe_dump(tree))
    server.moods["00001.tar"] = ["cut", "503"]
    train = commands["train"]
    assert train(tmp_path / "dvae.yaml", "--stop-after", 2) == 0
    assert train(tmp_path / "dvae.yaml") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "dvae" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 4 and set(steps) >= {1, 2, 3, 4}
    with pytest.raises(UserError, match="data fingerprint: "):
        train(tmp_path / "dvae.yaml", f"data.train={folder}/00000.tar", "train.steps=6")
