"""Exported models: where they lie, what they are, and how each is loaded by the ``model_type`` that it names.

An export is a folder with ``config.json`` and ``model.safetensors``, and whatever belongs to the model in folders
beside them; a run's is its ``model/``. What is new is one file and one line of a table below, and a family outside
`dalle` adds its lines to them (:meth:`dalle.lookup.LazyTable.add`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import MissingModel, UserError
from dalle.files import file_digest, read_json
from dalle.lookup import LazyTable
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE, PretrainedModel, read_description
from dalle.models.codec import Codec
from dalle.tensor_file import module_digest
from dalle.words import one_line

EXPORT_FOLDER = "model"                                       # of a run folder
CODEC_FOLDER, TOKENIZER_FOLDER = "codec", "tokenizer"         # of an export
SOURCE_FILE = "source.json"                                   # of an export: {"step": N, "averaged": true}
EXPORT = "python tools/export.py RUN --out FOLDER"
TRAIN_TOKENIZER = "python tools/train_tokenizer.py SHARDS"

# The model_type of an exported folder -> its class, a dalle.models.codec.Codec
CODECS = LazyTable({"dvae": ("dalle.models.dvae", "DiscreteVAE")})

# ... -> what loads it: (folder, device, dtype) -> Generator
GENERATORS = LazyTable({"text_to_image_transformer": ("dalle.sampling.generator", "TransformerGenerator.load")})

# ... -> what loads it: (folder, device) -> dalle.sampling.rerank.Reranker. One with encode_image and encode_captions,
# whose features have unit length, also serves the CLIP score and R-precision.
RERANKERS = LazyTable({"clip": ("dalle.sampling.rerank", "load_clip_reranker")})

Model = TypeVar("Model", bound=PretrainedModel)
OnProgress = Callable[[float], None]      # pictures' worth of work done


class Generator(Protocol):
    """A model that paints captions. The same seed, caption and model give the same picture, alone or in any batch."""

    image_size: int
    identity: dict[str, Any]    # what goes into results.json: kind, path, digest
    precision: str              # "fp32" or "bf16": the type that its networks compute in
    edits: bool                 # it changes pictures: its calls take ``sources``, uint8 [N, 3, S, S], too
    completes: bool             # it is a :class:`Completer`

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


class Completer(Generator, Protocol):
    """A generator that can go on from the top of a picture."""

    def complete(
        self, captions: list[str], seeds: list[int], image: Tensor, rows: int, **options: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """As ``generate_with_details``, with the first ``rows`` rows of codes of ``image`` (uint8 [3, H, W]) kept."""
        ...


# -- where a model lies

def find_model(path: str | Path) -> Path | None:
    """The folder with the ``config.json``: ``path`` itself or its ``model/``; None where neither has one."""
    path = Path(path)
    return next((folder for folder in (path / EXPORT_FOLDER, path) if (folder / CONFIG_FILE).is_file()), None)


def model_folder(path: str | Path) -> Path:
    """:func:`find_model`, or a ``UserError`` that lists what is near."""
    found, path = find_model(path), Path(path)
    if found is not None:
        return found
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


# -- what it is

def model_kind(folder: Path) -> str:
    """The ``model_type`` written in a model folder."""
    try:
        kind = read_description(folder).get("model_type")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if not isinstance(kind, str):
        raise UserError(f"{folder / CONFIG_FILE} does not say which kind of model it describes (model_type)")
    return kind


def identify(folder: Path, **parts: Path) -> dict[str, Any]:
    """Kind, path and digest of a model folder (and of named parts), so that a result says what made it."""
    identity = {"kind": model_kind(folder), "path": str(folder), "digest": file_digest(folder / WEIGHTS_FILE)}
    identity.update({f"{name}_digest": file_digest(part / WEIGHTS_FILE) for name, part in parts.items()})
    return identity


def codec_digests(codec: Codec, folder: Path) -> tuple[str, str]:
    """What ``codes.json`` may call the codec: its digest or, in caches of older versions, that of its file."""
    return module_digest(codec), file_digest(folder / WEIGHTS_FILE)


class Origin(NamedTuple):
    """Which checkpoint an exported model came from; None where nothing tells."""

    step: int | None
    weights: str | None          # EMA or raw


def origin_of(folder: Path) -> Origin:
    """Of a model folder: by its own note, or by the newest checkpoint of the run that it is the export of."""
    note = read_json(folder / SOURCE_FILE)
    if note is not None:
        return Origin(note.get("step"), "EMA" if note.get("averaged") else "raw")
    checkpoints = sorted(folder.parent.glob("checkpoints/step_*/state.json")) if folder.name == EXPORT_FOLDER else []
    for path in reversed(checkpoints):
        state = read_json(path)
        if state is not None:
            return Origin(state.get("step"), "EMA" if any(path.parent.glob("*/average*")) else "raw")
    return Origin(None, None)


# -- how it is loaded

def load_model(kind: type[Model], folder: Path, device: torch.device | str) -> Model:
    """``kind.from_pretrained`` with a user's one line for a folder that is incomplete or damaged."""
    try:
        return kind.from_pretrained(folder, device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {one_line(error)}") from error


def load_codec(folder: Path, device: torch.device | str) -> Codec:
    """The codec in ``folder``, of any kind in ``CODECS``."""
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
