"""Shards that are missing, cut or vanish: what is refused, and what becomes of the positions where it is not."""

import os
from collections import Counter

import pytest
from numbered import SIZE, numbered_shards, png, reds, take

from dalle.data.loader import train_batches, validation_batches
from dalle.data.reasons import remedy
from dalle.data.settings import DataConfig
from dalle.data.writer import ShardWriter
from dalle.errors import UserError


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_missing_shard_stops_the_run_or_leaves_every_position_what_it_was(tmp_path, caplog, whole_folder):
    folder = numbered_shards(tmp_path / "d")
    train = str(folder) if whole_folder else f"{folder}/{{00000..00003}}.tar"
    settings = DataConfig(train=train, image_size=SIZE, workers=0, bad_shards="skip", validation=train)

    def loaders():
        return [train_batches(settings, seed=0, batch_size=2, rank=rank, world_size=2) for rank in range(2)]

    whole = loaders()
    before = reds(whole, 14)                                        # two epochs
    (folder / "00001.tar").unlink()                                 # numbers 4 to 7
    with pytest.raises(UserError, match=r"00001\.tar .*data\.bad_shards=skip"):
        train_batches(settings.model_copy(update={"bad_shards": "refuse"}), seed=0, batch_size=4)
    skipping = loaders()
    assert [loader.skipped for loader in skipping] == [{"missing_shard": 1}, {}]      # counted once, over the ranks
    assert skipping[0].identity == whole[0].identity                # so that a resume goes on
    stand_in = {4: 8, 5: 9, 6: 10, 7: 11}                           # the same places of the next shard
    assert reds(skipping, 14) == [stand_in.get(number, number) for number in before]
    lost = sum((loader.skipped for loader in skipping), Counter())
    assert lost == {"missing_shard": 1, "in_bad_shard": 2 * len(stand_in)}          # and no word of max_bad_fraction
    assert "00001.tar is in the index but missing on disk: 4 of its 4 samples are gone" in caplog.text
    measured = [int(red) for batch in validation_batches(settings, seed=0, batch_size=5)
                for red in batch["image"][:, 0, 0, 0]]
    assert measured == [0, 1, 2, 3, *range(8, 14)]                  # a measure takes no sample twice
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="no shard matches; .* 4 of those wanted are missing"):
        train_batches(settings, seed=0, batch_size=4)


def test_a_missing_shard_that_no_index_knows_leaves_another_data_set(tmp_path, caplog):
    folder = numbered_shards(tmp_path / "d", count=12)
    settings = DataConfig(train=f"{folder}/{{00000..00003}}.tar", image_size=SIZE, workers=0, bad_shards="skip")
    loader = train_batches(settings, seed=0, batch_size=4)
    assert loader.skipped == {"missing_shard": 1} and loader.samples_per_epoch == 12
    assert "training without 1 missing shards" in caplog.text and "00003.tar" in caplog.text
    assert loader.report() == [f"left out: 1 missing_shard (00003.tar): {remedy('missing_shard')}"]
    with pytest.raises(UserError, match=r"00003\.tar does not exist"):
        train_batches(settings.model_copy(update={"bad_shards": "refuse"}), seed=0, batch_size=4)


def test_a_shard_lost_in_a_run_that_skips_costs_its_samples_alone(tmp_path):
    folder = numbered_shards(tmp_path / "d")
    settings = DataConfig(train=str(folder), image_size=SIZE, workers=0, bad_shards="skip")
    expected = reds([train_batches(settings, seed=0, batch_size=2)], 7)
    loader = train_batches(settings, seed=0, batch_size=2)
    (folder / "00002.tar").unlink()
    stand_in = {8: 12, 9: 13, 10: 12, 11: 13}                       # the last shard has two samples
    assert reds([loader], 7) == [stand_in.get(number, number) for number in expected]
    assert loader.skipped == {"in_bad_shard": 4}


def test_many_samples_behind_a_cut_are_replaced_by_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.dataset.MOST_REPLACEMENTS_TRIED", 6)
    folder = numbered_shards(tmp_path / "d", count=24, per_shard=12)
    settings = DataConfig(train=str(folder), image_size=SIZE, workers=0, max_bad_fraction=1)
    loader = train_batches(settings, seed=0, batch_size=24)
    os.truncate(folder / "00000.tar", 2 * 4 * 512)                 # two samples of four blocks are left
    assert sorted(reds([loader], 1)) == sorted([0, 1, *range(12, 24), *range(14, 24)])


def test_a_shard_cut_after_indexing_is_noticed(tmp_path):
    with ShardWriter(tmp_path / "d", 40) as writer:
        for number in range(40):
            writer.write(png(number), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, workers=0)
    loader = train_batches(settings, seed=0, batch_size=8)
    shard = tmp_path / "d" / "00000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match="truncated_shard"):
        take(loader, 60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_shard_is_one_clear_line_even_from_a_worker(tmp_path, workers):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for number in range(4):
            writer.write(png(number), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, workers=workers)
    loader = train_batches(settings, seed=0, batch_size=2)
    (tmp_path / "d" / "00000.tar").unlink()
    with pytest.raises(UserError) as caught:
        take(loader, 2)
    assert "00000.tar cannot be read" in str(caught.value) and "\n" not in str(caught.value)
    loader.close()
