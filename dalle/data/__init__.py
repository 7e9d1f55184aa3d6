"""Sharded tars to batches: index, reading order, decoding, captions, tokenizer, loader."""
