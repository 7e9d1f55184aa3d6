"""Captions to token ids: a lower-case byte-level BPE of the ``tokenizers`` library, or a list of whole words.

Id 0 is reserved for "unfilled": the transformer embeds the unfilled slot p as V + p, its own learned token (DALL-E,
arXiv 2102.12092, section 2.2). The folder written by :meth:`CaptionTokenizer.save` is one that
``transformers.PreTrainedTokenizerFast.from_pretrained`` reads.
"""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dalle.data.index import ShardIndex
from dalle.data.reader import ShardReader
from dalle.errors import UserError

UNFILLED = "<unfilled>"
UNKNOWN, UNKNOWN_ID = "<unknown>", 1      # of whole words: one that the list lacks
TOKENIZER_FILE = "tokenizer.json"
SMALLEST_VOCABULARY = 257         # the 256 bytes and the unfilled id
SMALLEST_WORD_LIST = 3            # unfilled, unknown and a word
KINDS = {("BPE", "ByteLevel"), ("WordLevel", "Split")}      # how a saved file describes model and splitting
MOST_REMEMBERED = 65_536         # captions split, and words merged: some 20 MB each
LONGEST_WORD = 256                # merging costs its square; longer ones are cut where merges are skipped
MIN_PAIR_COUNT = 2                # a pair seen once is the corpus, not the language


class Lost(NamedTuple):
    """What of a caption a model does not get to read; true where it is anything at all."""

    cut: int                     # tokens behind the last one that fits
    unknown: tuple[str, ...]     # words that the list lacks, as they are spelled: all are one token to the model

    def __bool__(self) -> bool:
        return self.cut > 0 or bool(self.unknown)


class CaptionTokenizer:
    """Encode with :meth:`encode`; ``vocab_size`` is V, real ids are 1..V-1, ``digest`` names the vocabulary.

    ``kind``: "bpe", or "words", where a token is a whole word; all but letters, digits and ``_`` is passed over.
    """

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.token_to_id(UNFILLED) != 0:
            raise ValueError(f"id 0 of the tokenizer is {tokenizer.id_to_token(0)!r}, not {UNFILLED!r}")
        # a caption that spells out "<unfilled>" must not produce id 0
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._merger: _Merger | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Tokenizer]]:
        """Made anew in a loader worker: the library's own pickles forget ``encode_special_tokens``."""
        return type(self), (self._tokenizer,)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16_384) -> Self:
        """A tokenizer of at most ``vocab_size`` entries, fewer where the corpus holds fewer pairs; deterministic."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"a byte-level vocabulary needs at least {SMALLEST_VOCABULARY} entries, not {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
        # the prefix space makes a caption's first word the same token as that word later on
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=MIN_PAIR_COUNT, special_tokens=[UNFILLED],
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def train_words(cls, captions: Iterable[str], vocab_size: int = 16_384, min_count: int = 1) -> Self:
        """The words that come at least ``min_count`` times, the commonest first, in at most ``vocab_size`` entries."""
        if vocab_size < SMALLEST_WORD_LIST:
            raise UserError(f"a list of words needs at least {SMALLEST_WORD_LIST} entries, not {vocab_size}: the "
                            "unfilled id, the unknown word and a word")
        normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        splitter = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
        words = sorted((word for word, count in counts.items() if count >= min_count),
                       key=lambda word: (-counts[word], word))
        entries = [UNFILLED, UNKNOWN, *words[:vocab_size - 2]]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(entries)}, UNKNOWN))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        tokenizer.add_special_tokens([UNFILLED])
        return cls(tokenizer)

    @classmethod
    def train_from_shards(cls, index: ShardIndex, vocab_size: int = 16_384) -> Self:
        """A BPE trained on every readable caption of the shards."""
        return cls.train(shard_captions(index), vocab_size)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The tokenizer saved in ``folder``. Raises :class:`UserError` when there is none or it is of another kind."""
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"no tokenizer in {folder} ({TOKENIZER_FILE} is missing); train one with "
                            "`python tools/train_tokenizer.py SHARDS --out FOLDER`")
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if (description["model"]["type"], description["pre_tokenizer"]["type"]) not in KINDS:
                raise ValueError("it is neither a byte-level BPE nor a list of words")
            return cls(Tokenizer.from_str(json.dumps(description)))
        except Exception as error:      # the library raises bare Exception for a malformed file
            raise UserError(f"{path} is not a tokenizer of ours: {error}; "
                            "train one with tools/train_tokenizer.py") from None

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, a ``PreTrainedTokenizerFast`` folder."""
        from transformers import PreTrainedTokenizerFast  # a second to import, needed only here

        fast = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, pad_token=UNFILLED, padding_side="right",
                                       clean_up_tokenization_spaces=False)
        try:
            fast.save_pretrained(str(folder))
        except OSError as error:
            raise UserError(f"the tokenizer cannot be written into {folder}: {error.strerror}") from None

    @property
    def kind(self) -> Literal["bpe", "words"]:
        return "words" if isinstance(self._tokenizer.model, models.WordLevel) else "bpe"

    @property
    def unknown_id(self) -> int | None:
        """What stands for a word that the list lacks; None for a BPE, which spells it."""
        return UNKNOWN_ID if self.kind == "words" else None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """A hash of what decides the ids: normaliser, word splitting, vocabulary and merges."""
        tree = json.loads(self._tokenizer.to_str())
        content = {part: tree[part] for part in ("normalizer", "pre_tokenizer")}
        content |= {"vocab": tree["model"]["vocab"], "merges": tree["model"].get("merges", [])}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def encode(self, caption: str, length: int, dropout: float = 0.0,
               rng: np.random.Generator | None = None) -> np.ndarray:
        """int64 [length]: the caption's ids, its head if it is too long, 0 in the unfilled slots on the right.

        With ``dropout`` p each applicable merge is skipped with probability p (BPE-dropout, arXiv 1910.13267), by
        ``rng``. The library has that too, but draws from a generator that cannot be seeded; so the merging is ours
        there, and equals the library's at p = 0 (tested).
        """
        ids = self.token_ids(caption, dropout, rng)[:length]
        padded = np.zeros(length, dtype=np.int64)
        padded[:len(ids)] = ids
        return padded

    def token_ids(self, caption: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """The caption's ids, all of them, without padding."""
        if dropout == 0.0:
            return self._tokenizer.encode(caption, add_special_tokens=False).ids
        if self.kind == "words":
            raise UserError("a tokenizer of whole words has no merges to skip: set data.bpe_dropout to 0")
        if rng is None:
            raise ValueError("dropout needs an rng")
        if not 0.0 < dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; it is a probability")
        if self._merger is None:
            self._merger = _Merger(self._tokenizer)
        skips = _Skips(dropout, rng)
        return [token for word in self._merger.words(caption) for token in self._merger.merge(word, skips)]

    def what_is_lost(self, caption: str, length: int) -> Lost:
        """What a model of ``length`` tokens does not read of ``caption``; a BPE knows every word by its bytes."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        unknown: dict[str, None] = {}
        if self.kind == "words":
            unknown = {caption[slice(*place)]: None
                       for token, place in zip(encoding.ids, encoding.offsets, strict=True) if token == UNKNOWN_ID}
        return Lost(max(0, len(encoding.ids) - length), tuple(unknown))

    def count(self, caption: str) -> int:
        """How many tokens the caption has before truncation."""
        return len(self.token_ids(caption))

    def decode(self, ids: Iterable[int]) -> str:
        """The caption, in lower case; unfilled slots are passed over."""
        return self._tokenizer.decode([int(token) for token in ids if token != 0]).strip()


class _Skips:
    """A seeded Bernoulli(p) stream, held as ``gap``, the distance to its next success: 1 means the next draw is one."""

    def __init__(self, probability: float, rng: np.random.Generator):
        self._probability, self._rng = probability, rng
        self._gaps: Iterator[int] = iter(())
        self.gap = self._next_gap()

    def renew(self) -> None:
        """Go on behind the success that :attr:`gap` pointed at."""
        self.gap = self._next_gap()

    def _next_gap(self) -> int:
        if self._probability == 1.0:
            return 1
        gap = next(self._gaps, None)
        if gap is None:
            # geometric by inversion, in blocks: a call costs more than sixteen numbers
            draws = np.log1p(-self._rng.random(16)) / math.log1p(-self._probability)
            self._gaps = iter((1 + np.minimum(draws, 1e9).astype(np.int64)).tolist())
            gap = next(self._gaps)
        return gap


class _Merger:
    """The trained merges applied word by word, with skipped merges.

    A word's ids are a function of which of its draws were skips, and words repeat; so that function is remembered, and
    a caption costs a few dictionary look-ups instead of its merges.
    """

    def __init__(self, tokenizer: Tokenizer):
        model = json.loads(tokenizer.to_str())["model"]
        self._normalizer, self._pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        self._vocabulary: dict[str, int] = model["vocab"]
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}       # pair of ids -> (rank, merged id)
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pair = (self._vocabulary[left], self._vocabulary[right])
            self._merges[pair] = (rank, self._vocabulary[left + right])
        self._words: dict[str, list[str]] = {}
        self._known: dict[tuple[str, tuple[int, ...]], tuple[list[int], int]] = {}

    def words(self, caption: str) -> list[str]:
        """The caption's words, spelled in the byte alphabet, as the library splits them."""
        words = self._words.get(caption)
        if words is None:
            text = self._normalizer.normalize_str(caption)
            split = self._pre_tokenizer.pre_tokenize_str(text) if text else []
            words = [sys.intern(word[start:start + LONGEST_WORD])
                     for word, _ in split for start in range(0, len(word), LONGEST_WORD)]
            if len(self._words) >= MOST_REMEMBERED:
                self._words.clear()
            self._words[caption] = words
        return words

    def merge(self, word: str, skips: _Skips) -> list[int]:
        """The word's ids; as many draws are taken from ``skips`` as :meth:`merge_with` makes."""
        skipped: tuple[int, ...] = ()
        used = 0
        while True:
            ids, draws = self._remembered(word, skipped)
            if used + skips.gap > draws:
                skips.gap -= draws - used
                return ids
            used += skips.gap
            skipped += (used,)
            skips.renew()

    def _remembered(self, word: str, skipped: tuple[int, ...]) -> tuple[list[int], int]:
        known = self._known.get((word, skipped))
        if known is None:
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            known = self._known[word, skipped] = self.merge_with(word, skipped)
        return known

    def merge_with(self, word: str, skipped: Collection[int]) -> tuple[list[int], int]:
        """(ids, number of draws) of a word when its draws numbered ``skipped`` (from 1) are skips.

        While any pair is left that can merge: draw for each, left to right, then merge the one of lowest rank that is
        not skipped, the leftmost of equals (arXiv 1910.13267, algorithm 1). When all are skipped, the word stays so.
        """
        symbols = [self._vocabulary[character] for character in word]
        draws = 0
        while True:
            best: tuple[int, int, int] | None = None                     # rank, place, merged id
            for place, pair in enumerate(itertools.pairwise(symbols)):
                found = self._merges.get(pair)
                if found is None:
                    continue
                draws += 1
                if draws not in skipped and (best is None or found[0] < best[0]):
                    best = (found[0], place, found[1])
            if best is None:
                return symbols, draws
            symbols[best[1]:best[1] + 2] = [best[2]]


def shard_captions(index: ShardIndex) -> Iterator[str]:
    """Every caption of the shards in order; those that cannot be used are passed over."""
    from dalle.data.decode import BadSample, sample_captions

    reader = ShardReader(index, max_open=2)
    for shard in range(len(index.shards)):
        for row in index.members(shard):
            try:
                yield from sample_captions(reader, shard, row)
            except BadSample:
                continue
    reader.close()
