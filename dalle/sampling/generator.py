"""The transformer as a painter of captions: what the store's ``Generator`` is for its exported folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.codec import Codec
from dalle.models.transformer import TextToImageTransformer
from dalle.pictures import fit_picture, to_bytes
from dalle.sampling.caption_warnings import lost_warnings
from dalle.sampling.decode import SamplingConfig, sample_codes
from dalle.store import CODEC_FOLDER, TOKENIZER_FOLDER, OnProgress, identify, load_codec, load_model, load_tokenizer

DECODE_BATCH = 16          # codec pictures at a time; always filled up, so that no picture depends on its company
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class TransformerGenerator:
    """The exported folder of a transformer run: transformer, tokenizer and codec.

    Options of every call: ``temperature``, ``top_k``, ``top_p``, ``guidance`` (see ``SamplingConfig``) and
    ``batch_size``, the number of pictures decoded side by side (none: sized to the memory).
    """

    edits: ClassVar[bool] = False
    completes: ClassVar[bool] = True

    def __init__(
        self,
        transformer: TextToImageTransformer,
        tokenizer: CaptionTokenizer,
        codec: Codec,
        identity: dict[str, Any] | None = None,
    ):
        check_codec(transformer, codec)
        if tokenizer.vocab_size > transformer.config.num_text_tokens:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the transformer "
                            f"{transformer.config.num_text_tokens}: they are not from the same run")
        self.transformer = transformer.eval()
        self.codec = codec.eval()
        self.tokenizer = tokenizer
        self.identity = identity or {"kind": transformer.model_type}
        self.image_size: int = codec.config.image_size

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> "TransformerGenerator":
        """Read an export folder; the codec stays in fp32, where its last layer's rounding would be seen."""
        transformer = load_model(TextToImageTransformer, folder, device).to(dtype)
        codec = load_codec(folder / CODEC_FOLDER, device)
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        return cls(transformer, tokenizer, codec, identify(folder, codec=folder / CODEC_FOLDER))

    @property
    def precision(self) -> str:
        """That of the transformer."""
        dtype = next(self.transformer.parameters()).dtype
        return PRECISIONS.get(dtype, str(dtype))

    def caption_warnings(self, captions: list[str]) -> list[str]:
        return lost_warnings(captions, self.tokenizer, self.transformer.config.text_length, "prompt")

    def settings(self, **options: Any) -> dict[str, Any]:
        return sampling_config(options).model_dump(mode="json")

    def generate(self, captions: list[str], seeds: list[int], **options: Any) -> Tensor:
        return self.generate_with_details(captions, seeds, **options)[0]

    @torch.no_grad()
    def generate_with_details(
        self, captions: list[str], seeds: list[int], known_codes: Tensor | None = None,
        batch_size: int | None = None, on_progress: OnProgress = lambda pictures: None, **options: Any,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """uint8 [N, 3, H, W] and N dicts with ``codes``; ``known_codes`` [k] are the first codes of all of them."""
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions but {len(seeds)} seeds: one seed a picture is needed")
        sampling = sampling_config(options)
        codes = torch.empty(len(seeds), self.codec.grid[0] * self.codec.grid[1], dtype=torch.int64)
        # Captions with equally many pictures go together: the decoder computes each caption once for all its pictures.
        done = 0
        for members in equal_groups(captions):
            text = self._encode([captions[group[0]] for group in members])
            flat = [index for group in members for index in group]
            sampled = sample_codes(self.transformer, text, [seeds[index] for index in flat], sampling,
                                   known_codes=known_codes, batch_size=batch_size,
                                   on_progress=partial(told_after, on_progress, done))
            codes[flat] = sampled.cpu()
            done += len(flat)
        images = self._paint(codes)
        return images, [{"codes": row.tolist()} for row in codes]

    @torch.no_grad()
    def complete(
        self, captions: list[str], seeds: list[int], image: Tensor, rows: int, **options: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Keep the first ``rows`` rows of codes of ``image`` (uint8 [3, H, W]) and paint the rest below them.

        The kept part is what the codec makes of it, not the original pixels. Returns what ``generate_with_details``
        does; raises ``UserError`` when no row would be kept, or none painted.
        """
        height, width = self.codec.grid
        if not 0 < rows < height:
            raise UserError(f"--rows {rows} is out of range: this model paints {height} rows of codes, "
                            f"so 1 to {height - 1} of them can be kept")
        device = next(self.codec.parameters()).device
        pixels = fit_picture(image, self.image_size).to(device)
        known = self.codec.encode(pixels[None])[0, : rows * width]
        return self.generate_with_details(captions, seeds, known_codes=known, **options)

    def _encode(self, captions: list[str]) -> Tensor:
        length = self.transformer.config.text_length
        ids = np.stack([self.tokenizer.encode(caption, length) for caption in captions])
        return torch.from_numpy(ids).to(next(self.transformer.parameters()).device)

    def _paint(self, codes: Tensor) -> Tensor:
        """Codes [N, h*w] -> uint8 [N, 3, H, W], in batches of one size: another size may round differently."""
        device = next(self.codec.parameters()).device
        images = torch.empty(len(codes), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for start in range(0, len(codes), DECODE_BATCH):
            part = codes[start : start + DECODE_BATCH]
            filled = torch.cat([part, part[-1:].expand(DECODE_BATCH - len(part), -1)]).to(device)
            images[start : start + len(part)] = to_bytes(self.codec.decode(filled))[: len(part)].cpu()
        return images


def check_codec(transformer: TextToImageTransformer, codec: Codec) -> None:
    """``UserError`` when the codec does not speak the transformer's codes."""
    config = transformer.config
    if tuple(codec.grid) != tuple(config.grid):
        raise UserError(f"the codec paints {codec.grid[0]} x {codec.grid[1]} codes, the transformer writes "
                        f"{config.grid[0]} x {config.grid[1]}: use the codec that the transformer was trained with")
    if codec.num_codes != config.num_codes:
        raise UserError(f"the codec has {codec.num_codes} codes, the transformer {config.num_codes}: "
                        "use the codec that the transformer was trained with")


def sampling_config(options: dict[str, Any]) -> SamplingConfig:
    """The typed options; ``UserError`` names the one that is unknown or out of range."""
    try:
        return SamplingConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        raise UserError(f"--{name.replace('_', '-')}: {first['msg']} (got {first.get('input')!r})") from error


def told_after(on_progress: OnProgress, done: int, pictures: float) -> None:
    """Tell what one group of pictures adds to those that are done."""
    on_progress(done + pictures)


def equal_groups(captions: Sequence[str]) -> list[list[list[int]]]:
    """Indices of each caption's pictures, put together where captions have equally many."""
    by_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        by_caption.setdefault(caption, []).append(index)
    by_size: dict[int, list[list[int]]] = {}
    for indices in by_caption.values():
        by_size.setdefault(len(indices), []).append(indices)
    return list(by_size.values())
