"""Batches of the exact tier: what is in them, whoever asks, after any stop; validation; the crops of a codec."""

import io
import pickle

import numpy as np
import pytest
import torch
from numbered import COUNT, SIZE, config, damaged_set, equal, interleave, png, take
from PIL import Image

from dalle.data.dataset import ShardDataset
from dalle.data.index import ShardIndex
from dalle.data.loader import ValidationPositions, train_batches, validation_batches, view_batches
from dalle.data.order import Order
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.errors import UserError


def test_a_batch_holds_what_the_order_says(data):
    loader = train_batches(config(data, codes=str(data / "codes")), seed=4, batch_size=6)
    order = Order(np.array([6, 6, 6, 5]), 4, lanes=3, window=2)
    tokenizer = CaptionTokenizer.load(data / "tokenizer")
    assert loader.samples_per_epoch == COUNT and loader.tokenizer.digest == tokenizer.digest
    for step, batch in enumerate(take(loader, 8)):                       # two epochs
        assert set(batch) == {"image", "text", "codes", "caption", "key", "position", "class_id"}
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (6, 3, SIZE, SIZE)
        assert batch["image"].is_contiguous()
        assert batch["text"].dtype == batch["codes"].dtype == batch["class_id"].dtype == torch.int64
        for row in range(6):
            position = int(batch["position"][row])
            assert position == step * 6 + row
            _, shard, index = order(position)
            number = shard * 6 + index
            assert batch["key"][row] == f"{shard:05d}{index:04d}"
            assert batch["image"][row, 0].unique().tolist() == [number]
            assert batch["image"][row, 1].unique().tolist() == [2 * number]
            assert batch["caption"][row] in (f"picture number {number}", f"second caption of {number}")
            kept = tokenizer.decode(batch["text"][row].tolist())
            assert batch["caption"][row].startswith(kept)
            assert batch["class_id"][row] == (number % 3 if number != 5 else -1)
            assert batch["codes"][row].unique().item() // 10 == number
    assert not loader.skipped


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 0), (2, 0, 3), (3, 1, 1), (6, 0, 0)])
def test_ranks_workers_and_restarts_only_divide_the_same_batches(data, world, workers, start):
    settings = {"flip": True, "crop": "random", "image_size": 6, "codes": str(data / "codes"), "caption_dropout": 0.3}
    reference = take(train_batches(config(data, **settings), seed=1, batch_size=6), 6)
    loaders = [train_batches(config(data, workers=workers, **settings), seed=1, batch_size=6, rank=rank,
                             world_size=world, start_step=start) for rank in range(world)]
    for expected, *parts in zip(reference[start:], *loaders, strict=False):
        equal(interleave(parts), expected)
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Six pictures of 19 pixels a side, whose red value says in which column a pixel lies."""
    folder = tmp_path_factory.mktemp("places")
    with ShardWriter(folder / "train", 6) as writer:
        for _ in range(6):
            buffer = io.BytesIO()
            Image.fromarray(np.indices((19, 19, 3))[1].astype(np.uint8)).save(buffer, "png")
            writer.write(buffer.getvalue(), "png", ["a picture"], None)
    return folder


def test_augmented_pictures_are_a_function_of_seed_and_position(places):
    """Cut from 19 / 16 of the side and mirrored: elsewhere in every epoch, the same for any ranks, after any stop."""
    settings = DataConfig(train=str(places / "train"), validation=str(places / "train"), image_size=16, crop="random",
                          crop_from=19 / 16, flip=True, workers=0)
    batches = take(train_batches(settings, seed=1, batch_size=6), 20)                        # 20 epochs
    edges = {(int(image[0, 0, 0]), int(image[0, 0, -1])) for batch in batches for image in batch["image"]}
    assert edges == {pair for left in range(4) for pair in ((left, left + 15), (left + 15, left))}
    shares = [train_batches(settings, seed=1, batch_size=6, rank=rank, world_size=2, start_step=17) for rank in (0, 1)]
    for expected, *parts in zip(batches[17:], *shares, strict=False):
        equal(interleave(parts), expected)
    (plain,) = validation_batches(settings, seed=1, batch_size=6)
    assert len(plain["image"].flatten(1).unique(dim=0)) == 1                # whole pictures, neither cut nor mirrored
    assert plain["image"][0, 0, 0, 0] <= 1 and plain["image"][0, 0, 0, -1] >= 17


def test_a_chain_of_stops_and_changes_is_the_uninterrupted_run(data):
    settings = {"images": False, "codes": str(data / "codes")}
    step, keys = 0, []
    for world, workers, steps in [(2, 1, 3), (1, 2, 2), (6, 0, 1), (3, 1, 4), (1, 0, 5), (2, 2, 2)]:
        loaders = [train_batches(config(data, workers=workers, **settings), seed=1, batch_size=6, rank=rank,
                                 world_size=world, start_step=step) for rank in range(world)]
        shares = [take(loader, steps) for loader in loaders]
        keys += [interleave(parts)["key"] for parts in zip(*shares, strict=True)]
        step += steps
        for loader in loaders:
            loader.close()
    assert keys == [batch["key"] for batch in take(train_batches(config(data, **settings), seed=1, batch_size=6), step)]
    line = [key for batch in keys for key in batch]
    for epoch in range(len(line) // COUNT):
        assert len(set(line[epoch * COUNT:(epoch + 1) * COUNT])) == COUNT


def test_every_epoch_is_every_sample_once(data):
    batches = take(train_batches(config(data), seed=0, batch_size=1), 3 * COUNT)
    for epoch in range(3):
        keys = [batch["key"][0] for batch in batches[epoch * COUNT:(epoch + 1) * COUNT]]
        assert len(set(keys)) == COUNT


def test_randomness_of_captions_views_and_dropout(data):
    settings = {"codes": str(data / "codes"), "caption_dropout": 0.5, "images": False}
    batches = take(train_batches(config(data, **settings), seed=0, batch_size=COUNT), 20)
    captions = {caption for batch in batches for caption in batch["caption"]}
    assert len(captions) == 2 * COUNT and "image" not in batches[0]
    assert {int(code) % 10 for batch in batches for code in batch["codes"][:, 0]} == {0, 1, 2}
    dropped = sum(int((batch["text"] == 0).all(1).sum()) for batch in batches)
    assert 0.4 < dropped / (20 * COUNT) < 0.6
    first = take(train_batches(config(data, caption="first"), seed=0, batch_size=COUNT), 1)[0]
    assert all(caption.startswith("picture number") for caption in first["caption"])


def test_text_does_not_depend_on_whether_pictures_are_read(data):
    settings = {"codes": str(data / "codes"), "caption_dropout": 0.2, "flip": True}
    with_images = take(train_batches(config(data, **settings), seed=3, batch_size=6), 5)
    without = take(train_batches(config(data, images=False, **settings), seed=3, batch_size=6), 5)
    for first, second in zip(with_images, without, strict=True):
        first.pop("image")
        equal(first, second)


def test_remembered_ids_are_the_encoded_ids(data):
    loader = train_batches(config(data, bpe_dropout=0.0), seed=0, batch_size=COUNT)
    for batch in take(loader, 4):
        expected = np.stack([loader.tokenizer.encode(caption, 12) for caption in batch["caption"]])
        np.testing.assert_array_equal(batch["text"].numpy(), expected)


def test_validation_is_one_plain_pass_in_order(data):
    loader = validation_batches(config(data, flip=True, crop="random", caption_dropout=1.0, images=True,
                                       validation_codes=str(data / "codes")), seed=9, batch_size=5)
    assert len(loader) == 5
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["key"]) for batch in batches] == [5, 5, 5, 5, 3]
        numbers = [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]
        assert numbers == list(range(COUNT))
        captions = [caption for batch in batches for caption in batch["caption"]]
        assert captions == [f"picture number {number}" for number in numbers]
        assert batches[0]["meta"][4] == {"class_id": 1, "name": "4"} and batches[1]["meta"][0] == {}
        assert [int(code) for batch in batches for code in batch["codes"][:, 0]] == [10 * n for n in numbers]
        assert all(row.any() for batch in batches for row in batch["text"])
    limited = validation_batches(config(data, workers=2), seed=9, batch_size=4, limit=6)
    for _ in range(2):
        assert [batch["position"].tolist() for batch in limited] == [[0, 1, 2, 3], [4, 5]]
    limited.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("local", [1, 2, 3, 5])
@pytest.mark.parametrize("total", range(4, 40))
def test_validation_gives_every_rank_as_many_batches(total, local, world):
    ranks = [list(ValidationPositions(total, local * world, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(0 < len(batch) <= local for batches in ranks for batch in batches)
    seen = sorted(position for batches in ranks for batch in batches for position in batch)
    assert seen == list(range(total - (total % world if local == 1 else 0)))
    for step in range(total // (local * world)):                  # full global batches keep their positions
        for rank in range(world):
            start = step * local * world
            if len(ranks[rank][step]) == local:
                assert ranks[rank][step] == list(range(start + rank, start + local * world, world))


def test_without_captions(tmp_path):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for number in range(6):
            writer.write(png(number), "png", [])
    settings = {"train": str(tmp_path / "d"), "image_size": SIZE, "workers": 0}
    batch = next(iter(train_batches(DataConfig(caption="none", **settings), seed=0, batch_size=6)))
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == list(range(6))
    assert "caption" not in batch and "text" not in batch
    with pytest.raises(UserError, match="empty_caption.*caption=none"):
        next(iter(train_batches(DataConfig(**settings), seed=0, batch_size=6)))


def test_view_batches_keep_rows_and_samples_aligned(tmp_path):
    settings = DataConfig(train=str(damaged_set(tmp_path / "d")), image_size=SIZE, workers=0, max_bad_fraction=0.5)
    batches = list(view_batches(settings, seed=0, batch_size=5, views=2))
    assert [batch["image"].shape for batch in batches][0] == (5, 2, 3, SIZE, SIZE)
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(18))
    valid = torch.cat([batch["valid"] for batch in batches])
    assert (~valid).nonzero().flatten().tolist() == [2, 3]           # a missing caption does not matter here
    reds = torch.cat([batch["image"] for batch in batches])[:, :, 0, 0, 0]
    assert reds.tolist() == [[n, n] if n not in (2, 3) else [0, 0] for n in range(18)]


def test_views_are_different_crops(tmp_path):
    ramp = Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (8, 64, 3)).copy())
    buffer = io.BytesIO()
    ramp.save(buffer, "png")
    with ShardWriter(tmp_path / "d") as writer:
        writer.write(buffer.getvalue(), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=8, crop="random", workers=0)
    image = next(iter(view_batches(settings, seed=0, batch_size=1, views=6)))["image"]
    assert len(set(image[0, :, 0, 0, 0].tolist())) > 3


def test_iterating_leaves_the_global_generator_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(train_batches(config(data), seed=0, batch_size=2), 2)
    assert torch.equal(torch.rand(1), expected)


def test_dataset_can_be_sent_to_a_spawned_worker(data):
    index = ShardIndex.load(str(data / "train"))
    dataset = ShardDataset(config(data), index, seed=0, training=True,
                           tokenizer=CaptionTokenizer.load(data / "tokenizer"))
    expected = dataset.fetch([3, 1, 4])
    equal(pickle.loads(pickle.dumps(dataset)).fetch([3, 1, 4]), expected)


def test_wrong_requests(data, tmp_path):
    with pytest.raises(UserError, match="12 samples cannot be shared by 5 processes; use one of 1, 2, 3, 4, 6, 12"):
        train_batches(config(data), seed=0, batch_size=12, world_size=5)
    with pytest.raises(UserError, match="must be at least 1"):
        train_batches(config(data), seed=0, batch_size=0)
    with pytest.raises(UserError, match="data.validation is not set"):
        validation_batches(config(data, validation=None), seed=0, batch_size=2)
    with pytest.raises(UserError, match="validation_codes is not"):
        validation_batches(config(data, images=False, codes=str(data / "codes")), seed=0, batch_size=2)
    with pytest.raises(UserError, match="2 samples, fewer than the 4 processes"):
        validation_batches(config(data), seed=0, batch_size=4, world_size=4, limit=2)
    with pytest.raises(UserError, match="no tokenizer"):
        train_batches(config(data, tokenizer=str(tmp_path)), seed=0, batch_size=2)
    with pytest.raises(TypeError, match="endless"):
        len(train_batches(config(data), seed=0, batch_size=2))
