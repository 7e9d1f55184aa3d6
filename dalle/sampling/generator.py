"""What makes pictures from captions, behind one interface; rerank, galleries and judges know only that."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import MissingModel, UserError
from dalle.files import file_digest
from dalle.lookup import GENERATORS
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE, PretrainedModel, read_description
from dalle.models.dvae import DiscreteVAE
from dalle.models.transformer import TextToImageTransformer
from dalle.pictures import fit_picture, to_bytes
from dalle.sampling.decode import SamplingConfig, sample_codes
from dalle.words import one_line, shorten

EXPORT_FOLDER = "model"    # of a run folder
EXPORT = "python tools/export.py RUN --out FOLDER"
TRAIN_TOKENIZER = "python tools/train_tokenizer.py SHARDS"
DECODE_BATCH = 16          # codec pictures at a time; always filled up, so that no picture depends on its company

CODECS: dict[str, type[PretrainedModel]] = {DiscreteVAE.model_type: DiscreteVAE}


OnProgress = Callable[[float], None]      # pictures' worth of work done
Model = TypeVar("Model", bound=PretrainedModel)


class Generator(Protocol):
    """A model that paints captions. The same seed, caption and model give the same picture, alone or in any batch.

    One with the attribute ``edits = True`` changes pictures: its calls take ``sources``, uint8 [N, 3, S, S], too. One
    whose networks stay in a type of their own says so in ``precision`` (``"fp32"``).
    """

    image_size: int
    identity: dict[str, Any]    # what goes into results.json: kind, path, digest

    def generate(self, captions: list[str], seeds: list[int], **options: Any) -> Tensor:
        """One picture for each (caption, seed): uint8 [N, 3, H, W]."""
        ...

    def generate_with_details(
        self, captions: list[str], seeds: list[int], **options: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The pictures, and for each what it was made of (for the transformer: its ``codes``).

        The option ``on_progress`` is told, now and then, how many pictures' worth of the work is done.
        """
        ...

    def caption_warnings(self, captions: list[str]) -> list[str]:
        """A line for every caption that the model cannot take whole."""
        ...

    def settings(self, **options: Any) -> dict[str, Any]:
        """All that changes a picture, with the defaults of what ``options`` leave out; ``UserError`` for a bad one."""
        ...


class TransformerGenerator:
    """The exported folder of a transformer run: transformer, tokenizer and codec.

    Options of every call: ``temperature``, ``top_k``, ``top_p``, ``guidance`` (see ``SamplingConfig``) and
    ``batch_size``, the number of pictures decoded side by side (none: sized to the memory).
    """

    def __init__(
        self,
        transformer: TextToImageTransformer,
        tokenizer: CaptionTokenizer,
        codec: DiscreteVAE,
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
        codec = load_codec(folder / "codec", device)
        tokenizer = load_tokenizer(folder / "tokenizer")
        return cls(transformer, tokenizer, codec, identify(folder, codec=folder / "codec"))

    @property
    def rows(self) -> int:
        """Rows of codes in a picture."""
        return self.codec.grid[0]

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


def load_generator(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    """The generator of a run folder (which has ``model/``) or of a model folder; ``UserError`` for anything else."""
    folder = model_folder(path)
    kind = model_kind(folder)
    if kind not in GENERATORS:
        raise UserError(f"{path} holds a {kind!r} model; sampling needs a generator: "
                        f"{', '.join(sorted(GENERATORS))}{GENERATORS.remedy}")
    return GENERATORS[kind](folder, device, dtype)


def model_folder(path: str | Path) -> Path:
    """The folder with the ``config.json``: ``path`` itself or its ``model/``; a ``UserError`` lists what is near."""
    path = Path(path)
    for folder in (path / EXPORT_FOLDER, path):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if path.is_dir():
        raise MissingModel(f"{path} holds no model: neither {EXPORT_FOLDER}/{CONFIG_FILE} nor {CONFIG_FILE} is there; "
                           "has its training exported one?", path)
    near = neighbours(path)
    raise MissingModel(f"{path} does not exist; " + (f"models near it: {', '.join(near)}" if near
                                                     else "train one first"), path)


def neighbours(path: Path) -> list[str]:
    """Folders with a model beside ``path``, or below the nearest parent that exists."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    places = [*parent.glob(f"*/{EXPORT_FOLDER}/{CONFIG_FILE}"), *parent.glob(f"*/*/{EXPORT_FOLDER}/{CONFIG_FILE}")]
    return sorted(str(place.parent.parent) for place in places)[:8]


def model_kind(folder: Path) -> str:
    """The ``model_type`` written in a model folder."""
    try:
        kind = read_description(folder).get("model_type")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if not isinstance(kind, str):
        raise UserError(f"{folder / CONFIG_FILE} does not say which kind of model it describes (model_type)")
    return kind


def load_model(kind: type[Model], folder: Path, device: torch.device | str) -> Model:
    """``kind.from_pretrained`` with a user's one line for a folder that is incomplete or damaged."""
    try:
        return kind.from_pretrained(folder, device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {one_line(error)}") from error


def load_codec(folder: Path, device: torch.device | str) -> DiscreteVAE:
    """The codec of an export folder, of any kind in ``CODECS``."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder.parent} has no {folder.name}/, which belongs to an exported transformer: copy the "
                        f"whole folder again, or make it from the run with `{EXPORT}`")
    kind = model_kind(folder)
    if kind not in CODECS:
        raise UserError(f"{folder} holds a {kind!r}, not a codec: {', '.join(sorted(CODECS))}")
    return load_model(CODECS[kind], folder, device)


def load_tokenizer(folder: Path) -> CaptionTokenizer:
    """The tokenizer in ``folder``, of a data set or of a model; where it is missing, how to get one of its kind."""
    if not folder.parent.is_dir():
        raise MissingModel(f"{folder.parent} does not exist; its tokenizer is looked for there (one of a data set is "
                           f"made by `{TRAIN_TOKENIZER} --out {folder}`)", folder)
    if not folder.is_dir() and (folder.parent / CONFIG_FILE).is_file():
        raise UserError(f"{folder.parent} has no {folder.name}/, which belongs to the model: copy the whole folder "
                        f"again, or make it from the run with `{EXPORT}`")
    if not folder.is_dir():
        raise UserError(f"the tokenizer {folder} does not exist; train one: `{TRAIN_TOKENIZER} --out {folder}`")
    return CaptionTokenizer.load(folder)


def check_codec(transformer: TextToImageTransformer, codec: DiscreteVAE) -> None:
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


def lost_warnings(captions: Sequence[str], tokenizer: CaptionTokenizer, length: int, what: str) -> list[str]:
    """A line for each different caption of more than ``length`` tokens, and for each with words that are unknown."""
    lines = []
    for caption in dict.fromkeys(captions):
        lost = tokenizer.what_is_lost(caption, length)
        if lost.cut:
            lines.append(cut_warning(what, caption, length + lost.cut, length))
        if lost.unknown:
            lines.append(unknown_warning(what, caption, lost.unknown))
    return lines


def cut_warning(what: str, caption: str, count: int, length: int, unit: str = "tokens") -> str:
    """That a model reads ``length`` of the ``count`` units of a caption."""
    return (f"the {what} \"{shorten(caption)}\" has {count} {unit}, this model reads {length}: "
            f"the first {length} are kept")


def unknown_warning(what: str, caption: str, unknown: Sequence[str], unit: str = "words") -> str:
    """That a model cannot tell ``unknown`` from one another."""
    return (f"the {what} \"{shorten(caption)}\" has {unit} that this model does not know, all the same to it: "
            f"{shorten(' '.join(unknown))}")


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


def identify(folder: Path, **parts: Path) -> dict[str, Any]:
    """Kind, path and digest of a model folder (and of named parts), so that a result says what made it."""
    identity = {"kind": model_kind(folder), "path": str(folder), "digest": file_digest(folder / WEIGHTS_FILE)}
    identity.update({f"{name}_digest": file_digest(part / WEIGHTS_FILE) for name, part in parts.items()})
    return identity
