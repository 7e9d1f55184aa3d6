"""The tokenizer of whole words: a list counted by hand, the same folder format, and no dropout."""

import pickle

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dalle.data.index import ShardIndex
from dalle.data.loader import train_batches
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import UNKNOWN, CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

CORPUS = ["A red bird, a RED wing!", "a blue bird; it's 2 wings", "a wing  and\ta _beak_"]
# counted by hand: a 5, then bird, red, wing 2 each in alphabetical order, then the others, once each
BY_FREQUENCY = ["a", "bird", "red", "wing", "2", "_beak_", "and", "blue", "it", "s", "wings"]


@pytest.fixture
def words() -> CaptionTokenizer:
    return CaptionTokenizer.train_words(CORPUS)


def test_ids_follow_frequency_then_spelling(words):
    assert words.kind == "words" and words.vocab_size == 2 + len(BY_FREQUENCY)
    assert [words.token_ids(word) for word in BY_FREQUENCY] == [[number] for number in range(2, 13)]


def test_words_are_lower_case_and_everything_else_is_passed_over(words):
    assert words.token_ids("  Red-winged\nBIRD...") == [4, 1, 3]
    assert words.encode("a red bird", 5).tolist() == [2, 4, 3, 0, 0]
    assert words.encode("a red bird", 2).tolist() == [2, 4]
    assert words.count("it's a bird!") == 4 and words.token_ids("?!") == [] and words.token_ids("") == []
    assert words.token_ids("Ä  é") == [1, 1]


def test_decoding_gives_the_words_and_marks_the_unknown(words):
    assert words.decode([2, 4, 3, 0, 0]) == "a red bird"
    assert words.decode(words.encode("a green bird", 6)) == f"a {UNKNOWN} bird"


def test_captions_that_spell_the_special_tokens_are_words(words):
    assert words.token_ids("<unfilled> bird <unknown>") == [1, 3, 1]


@pytest.mark.parametrize(("caption", "length", "cut", "unknown"), [
    ("a red bird", 3, 0, ()), ("a red bird", 2, 1, ()), ("", 3, 0, ()), ("?!", 3, 0, ()),
    ("A Grün dog, a dog", 4, 1, ("Grün", "dog")), ("a \u0047ru\u0308n bird", 4, 0, ("Gru\u0308n",)),
])
def test_what_a_model_does_not_read_of_a_caption(words, caption, length, cut, unknown):
    lost = words.what_is_lost(caption, length)
    assert lost == (cut, unknown) and bool(lost) == bool(cut or unknown)


def test_rare_words_and_those_beyond_the_limit_are_unknown():
    assert CaptionTokenizer.train_words(CORPUS, min_count=2).vocab_size == 6
    short = CaptionTokenizer.train_words(CORPUS, vocab_size=4)
    assert short.token_ids("a bird red") == [2, 3, 1] and short.vocab_size == 4
    with pytest.raises(UserError, match="at least 3 entries, not 2"):
        CaptionTokenizer.train_words(CORPUS, vocab_size=2)


def test_the_folder_is_read_back_by_us_by_a_worker_and_by_transformers(words, tmp_path):
    words.save(tmp_path)
    loaded = CaptionTokenizer.load(tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (loaded.kind, loaded.digest, loaded.vocab_size) == (words.kind, words.digest, words.vocab_size)
    for caption in [*CORPUS, "a <unfilled> green bird"]:
        ids = words.token_ids(caption)
        assert ids == loaded.token_ids(caption) == pickle.loads(pickle.dumps(loaded)).token_ids(caption)
        assert loaded.decode(ids) == words.decode(ids)
    assert fast("a red bird")["input_ids"] == [2, 4, 3] and fast.pad_token_id == 0


def test_lists_with_other_words_have_other_digests(words):
    assert words.digest != CaptionTokenizer.train_words(CORPUS, min_count=2).digest
    assert words.digest == CaptionTokenizer.train_words(list(reversed(CORPUS))).digest


def test_dropout_is_refused_in_one_line(words, tmp_path):
    with pytest.raises(UserError, match="whole words has no merges to skip: set data.bpe_dropout to 0"):
        words.token_ids("a bird", 0.1, np.random.default_rng(0))
    with ShardWriter(tmp_path / "train", 5) as writer:
        writer.write(b"x", "png", CORPUS)
    words.save(tmp_path / "words")
    settings = {"train": str(tmp_path / "train"), "tokenizer": str(tmp_path / "words"), "images": False,
                "text_length": 4, "workers": 0}
    with pytest.raises(UserError, match="^data.bpe_dropout is 0.1, but .* holds whole words, .* to 0$"):
        train_batches(DataConfig(**settings), seed=0, batch_size=1)
    loader = train_batches(DataConfig(**settings, bpe_dropout=0), seed=0, batch_size=1)
    assert next(iter(loader))["text"][0, 0] == 2
    assert CaptionTokenizer.train_from_shards(ShardIndex.load(settings["train"]), 300).kind == "bpe"
