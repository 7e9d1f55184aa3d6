import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.data.index import ShardIndex
from dalle.data.tokenizer import UNFILLED, CaptionTokenizer, _Merger, _Skips
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
SHAPES = ["circle", "square", "triangle", "star", "heart"]
CORPUS = [f"a {size} {colour} {shape} above the other {other}" for size in ("small", "large") for colour in COLOURS
          for shape in SHAPES for other in SHAPES]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(CORPUS, 320)


def test_vocabulary_size_and_reserved_id(tokenizer):
    assert tokenizer.vocab_size == 320
    ids = tokenizer.encode("a small red circle", 16)
    assert ids.dtype == np.int64 and ids.shape == (16,)
    used = tokenizer.count("a small red circle")
    assert (ids[:used] > 0).all() and (ids[used:] == 0).all() and 0 < used < 16


def test_case_and_white_space_do_not_matter(tokenizer):
    expected = tokenizer.encode("a cat", 16).tolist()
    assert tokenizer.encode("A Cat", 16).tolist() == expected
    assert tokenizer.encode("  a \t cat\n", 16).tolist() == expected


def test_first_word_is_the_same_token_as_later(tokenizer):
    twice = tokenizer.token_ids("circle circle")
    assert twice[:len(twice) // 2] == twice[len(twice) // 2:]


def test_long_captions_keep_their_head(tokenizer):
    caption = " ".join(["a red star"] * 10)
    full = tokenizer.encode(caption, 100)
    assert tokenizer.encode(caption, 5).tolist() == full[:5].tolist()
    assert tokenizer.count(caption) == np.count_nonzero(full)


def test_empty_caption_is_all_unfilled(tokenizer):
    assert tokenizer.encode("", 4).tolist() == [0] * 4
    assert tokenizer.encode(" ", 4, 0.5, np.random.default_rng(0)).tolist() == [0] * 4


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips_and_never_gives_the_reserved_id(text):
    tokenizer = _shared()
    ids = tokenizer.token_ids(text)
    assert 0 not in ids and max(ids, default=1) < tokenizer.vocab_size
    normal = tokenizer._tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids) == normal.strip()


def _shared(cache=[]):  # noqa: B006 - hypothesis and module fixtures do not mix
    if not cache:
        cache.append(CaptionTokenizer.train(CORPUS, 320))
    return cache[0]


def test_what_of_a_caption_is_lost_is_what_lies_behind_the_length_and_no_word(tokenizer):
    count = tokenizer.count("a small red circle")
    assert not tokenizer.what_is_lost("a small red circle", count)
    assert tokenizer.what_is_lost("a small red circle", count - 2) == (2, ())
    assert tokenizer.what_is_lost("żółw 🐢", 1000) == (0, ())          # unseen words are spelled in bytes


def test_a_caption_that_spells_the_special_token(tokenizer):
    assert 0 not in tokenizer.token_ids(f"a {UNFILLED} star")
    assert tokenizer.decode(tokenizer.encode(f"a {UNFILLED} star", 64)) == f"a {UNFILLED} star"


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    for caption in (CORPUS[0], f"a {UNFILLED} cat"):
        assert again.token_ids(caption) == tokenizer.token_ids(caption) and 0 not in again.token_ids(caption)



@pytest.mark.parametrize("caption", [*CORPUS[::37], "an unseen wörd, 123 & more!", "aaaaaaaaaa", "日本語", "it's"])
def test_own_merging_without_skips_equals_the_library(tokenizer, caption):
    merger = _Merger(tokenizer._tokenizer)
    ids = [token for word in merger.words(caption) for token in merger.merge_with(word, ())[0]]
    assert ids == tokenizer.token_ids(caption)
    assert tokenizer.token_ids(caption, 1e-12, np.random.default_rng(0)) == ids


def test_dropout_one_gives_base_symbols(tokenizer):
    ids = tokenizer.token_ids("Red stär", 1.0, np.random.default_rng(0))
    alphabet = json.loads(tokenizer._tokenizer.to_str())["model"]["vocab"]
    assert ids == [alphabet[symbol] for symbol in ["Ġ", "r", "e", "d", "Ġ", "s", "t", "Ã", "¤", "r"]]


def test_dropout_is_decided_by_the_rng_alone(tokenizer):
    caption = CORPUS[7]
    fresh = CaptionTokenizer.train(CORPUS, 320)
    seen = set()
    for seed in range(30):
        ids = tokenizer.token_ids(caption, 0.3, np.random.default_rng(seed))
        assert ids == fresh.token_ids(caption, 0.3, np.random.default_rng(seed))          # no memory of earlier calls
        assert tokenizer.decode(ids) == caption
        seen.add(tuple(ids))
    assert len(seen) > 20


def test_remembered_merging_equals_one_draw_after_another(tokenizer):
    """The naive loop: one Bernoulli draw for each mergeable pair, in the same stream."""
    merger = _Merger(tokenizer._tokenizer)

    def naive(word, skips):
        symbols = [merger._vocabulary[character] for character in word]
        while True:
            kept = []
            for place in range(len(symbols) - 1):
                found = merger._merges.get((symbols[place], symbols[place + 1]))
                if found is not None:
                    skips.gap -= 1
                    if skips.gap == 0:
                        skips.renew()
                    else:
                        kept.append((found[0], place, found[1]))
            if not kept:
                return symbols
            _, place, merged = min(kept)
            symbols[place:place + 2] = [merged]

    for seed in range(20):
        first, second = (_Skips(0.25, np.random.default_rng(seed)) for _ in range(2))
        for caption in CORPUS[::29]:
            for word in merger.words(caption):
                assert merger.merge(word, first) == naive(word, second)
        assert first.gap == second.gap


def test_skips_come_at_their_rate():
    skips = _Skips(0.1, np.random.default_rng(0))
    gaps = []
    for _ in range(20_000):
        gaps.append(skips.gap)
        skips.renew()
    assert min(gaps) == 1 and np.mean(gaps) == pytest.approx(10, rel=0.03)
    assert np.mean(np.array(gaps) == 1) == pytest.approx(0.1, abs=0.01)


def test_a_word_without_end_costs_no_hours(tokenizer):
    assert len(tokenizer.token_ids("a" * 100_000, 0.1, np.random.default_rng(0))) > 1000


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_dropout_must_be_a_probability(tokenizer, dropout):
    with pytest.raises(ValueError, match="probability"):
        tokenizer.token_ids("a", dropout, np.random.default_rng(0))
    with pytest.raises(ValueError, match="rng"):
        tokenizer.token_ids("a", 0.5)


def test_training_is_deterministic_and_small_corpora_give_small_vocabularies():
    first, second = (CaptionTokenizer.train(iter(CORPUS), 300) for _ in range(2))
    assert first.digest == second.digest and first.vocab_size == 300
    assert first.digest != CaptionTokenizer.train(CORPUS, 301).digest
    assert CaptionTokenizer.train(["ab", "ab"], 16_384).vocab_size == 259             # 256 bytes, unfilled, " a", " ab"
    assert CaptionTokenizer.train([], 400).vocab_size == 257
    with pytest.raises(UserError, match="at least 257"):
        CaptionTokenizer.train(CORPUS, 100)


def test_folder_is_read_by_us_and_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    loaded = CaptionTokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest and loaded.vocab_size == tokenizer.vocab_size
    for reader in (PreTrainedTokenizerFast, AutoTokenizer):
        fast = reader.from_pretrained(tmp_path)
        assert fast.pad_token_id == 0 and len(fast) == tokenizer.vocab_size
        padded = fast("A large RED star", padding="max_length", max_length=24, truncation=True)["input_ids"]
        assert padded == tokenizer.encode("A large RED star", 24).tolist()
        assert padded == loaded.encode("a large red star", 24).tolist()


def test_the_library_keeps_no_padding_of_a_saved_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(tree))
    loaded = CaptionTokenizer.load(tmp_path)
    assert loaded.count("a small red circle") == tokenizer.count("a small red circle") > 2
    assert loaded.digest == tokenizer.digest


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "WordPiece"}}', "[]"])
def test_unusable_folders(tmp_path, content):
    with pytest.raises(UserError, match=r"no tokenizer in .*train_tokenizer\.py"):
        CaptionTokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="is not a tokenizer of ours"):
        CaptionTokenizer.load(tmp_path)


def test_training_from_shards_equals_training_on_their_captions(tmp_path):
    with ShardWriter(tmp_path, 7) as writer:
        for place in range(0, 20, 2):
            writer.write(b"picture", "png", CORPUS[place:place + 2])
        writer.write(b"picture", "png", [])
    trained = CaptionTokenizer.train_from_shards(ShardIndex.load(str(tmp_path)), 300)
    assert trained.digest == CaptionTokenizer.train(CORPUS[:20], 300).digest
