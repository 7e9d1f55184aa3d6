#!/usr/bin/env python
"""Train the text tokenizer on the captions of shards: a lower-case byte-level BPE, or a list of whole words.

    python tools/train_tokenizer.py data/shapes/train --out data/shapes/tokenizer --vocab-size 16384
    python tools/train_tokenizer.py data/cub/train --out data/cub/words --kind words --min-count 5

The folder it writes is read by ``data.tokenizer`` of a config and by ``transformers.PreTrainedTokenizerFast``.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle.data.index import ShardIndex
from dalle.data.tokenizer import UNKNOWN_ID, CaptionTokenizer, shard_captions
from dalle.errors import UserError, run_command

CAPTIONS_MEASURED = 10_000


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a folder, a glob or a brace range; several joined by '::'")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--kind", choices=("bpe", "words"), default="bpe", help="words: a token is a whole word, those "
                        "that the list lacks are one and the same (default: bpe)")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="entries at most, unfilled id included")
    parser.add_argument("--min-count", type=int, help="of words: leave out what comes less often (default: 1)")
    parser.add_argument("--bad-shards", choices=("refuse", "skip"), default="refuse", help="missing or damaged ones: "
                        "stop (default), or go on without what is lost")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    if options.min_count is not None and options.kind != "words":
        raise UserError("--min-count is for --kind words; a BPE spells what it has not seen")
    index = ShardIndex.load(options.shards, options.bad_shards)
    if options.kind == "words":
        tokenizer = CaptionTokenizer.train_words(shard_captions(index), options.vocab_size, options.min_count or 1)
    else:
        tokenizer = CaptionTokenizer.train_from_shards(index, options.vocab_size)
    measured = [tokenizer.token_ids(caption) for caption in itertools.islice(shard_captions(index), CAPTIONS_MEASURED)]
    lengths = [len(ids) for ids in measured]
    if not lengths:
        raise UserError(f"{options.shards} holds no usable caption; a sample's captions are KEY.txt, one a line")
    tokenizer.save(options.out)
    print(f"{options.out}: {tokenizer.vocab_size} entries in {time.perf_counter() - started:.1f} s; tokens a caption: "
          f"median {np.median(lengths):.0f}, 99% {np.percentile(lengths, 99):.0f}, longest {max(lengths)}")
    if options.kind == "words":
        print(f"unknown: {sum(ids.count(UNKNOWN_ID) for ids in measured) / max(1, sum(lengths)):.2%} of the words")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"the captions hold no more than that; {options.vocab_size} were asked for")


if __name__ == "__main__":
    run_command(main)
