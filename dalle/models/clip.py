"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) through ``open_clip``: this file and
``clip_blocks.py`` alone know it.

``ClipModel`` is trained here: open_clip towers behind our caption ids and raw pictures. ``OpenClipScorer`` wraps a
pretrained open_clip model, with the tokenizer and the preprocessing that belong to it, as a judge of pictures.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dalle.models.clip_towers  # noqa: F401  (its names become known to timm, and so to `timm_model_name`)
from dalle.models.base import ModelConfig, PretrainedModel
from dalle.models.clip_blocks import encode_ends, pools_the_end, take_over
from dalle.models.kernels import kernels_for

MAX_LOG_SCALE = math.log(100)   # arXiv 2103.00020, section 2.5: logits are never scaled by more than 100
CLIP_LOG_SCALE = math.log(1 / 0.07)
SIGLIP_LOG_SCALE = math.log(10)
SIGLIP_BIAS = -10.0
LOCAL_FOLDER_CONFIG = "open_clip_config.json"
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}

# How torch, safetensors and open_clip fail on a file that is anything else.
NOT_PLAIN_WEIGHTS = (UnpicklingError, SafetensorError, EOFError, KeyError, TypeError, AttributeError, StopIteration,
                     UnicodeDecodeError, IndexError)

# Set by the caption ids and the model config, never by hand.
RESERVED_TEXT_FIELDS = {"context_length", "vocab_size", "pad_id", "eos_id"}
# Tables of positions, tokens that stand for a whole picture, queries that pool it and gains of layer scale, by their
# names in open_clip and timm: `no_weight_decay` leaves out those of pooling layers and of some towers.
UNDECAYED = {"positional_embedding", "pos_embed", "class_embedding", "cls_token", "reg_token", "query", "latent",
             "gamma"}
SHARES = {"patch_dropout", "timm_drop", "timm_drop_path"}      # the others of open_clip's numbers are sizes and factors
PixelMean = Annotated[float, Field(ge=0, le=1)]


class ClipArchitecture(ModelConfig):
    """Everything about a CLIP that does not follow from its tokenizer and its loss.

    Either ``architecture``, the name of one of open_clip's model configs, or ``vision`` and ``text``, which take the
    fields of open_clip's ``CLIPVisionCfg`` and ``CLIPTextCfg`` (vocabulary and context length are set for them).
    """

    architecture: str | None = Field(None, description="name of an open_clip model config, in place of vision and text")
    embed_dim: int = Field(64, ge=1, description="length of the features that pictures and captions share; an "
                           "architecture has its own")
    vision: dict[str, Any] | None = Field(None, description="the image tower: fields of open_clip's CLIPVisionCfg")
    text: dict[str, Any] | None = Field(None, description="the text tower: fields of open_clip's CLIPTextCfg")
    image_size: int | None = Field(None, ge=1, description="side that pictures are resized to, in pixels; the tower's "
                                   "own where it is not given")
    image_mean: tuple[PixelMean, PixelMean, PixelMean] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="subtracted from red, green and blue in [0, 1]")
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="what red, green and blue are then divided by")

    @model_validator(mode="after")
    def _one_source_of_towers(self) -> "ClipArchitecture":
        if self.architecture is not None:
            if self.vision is not None or self.text is not None:
                raise ValueError("`architecture` already says what the towers are: leave out `vision` and `text`")
            known_architecture(self.architecture)
        elif self.vision is None or self.text is None:
            raise ValueError("give either `architecture` (an open_clip model config) or both `vision` and `text`")
        else:
            _check_fields("vision", self.vision, CLIPVisionCfg, set())
            _check_fields("text", self.text, CLIPTextCfg, RESERVED_TEXT_FIELDS)
            _check_sizes(CLIPVisionCfg(**self.vision), CLIPTextCfg(**self.text), self.image_size)
        return self


class ClipConfig(ClipArchitecture):
    """The whole model: its towers, and what the tokenizer and the loss say."""

    text_length: int = Field(ge=1, description="longest caption, in tokens")
    num_text_tokens: int = Field(ge=2, description="the tokenizer's vocabulary V, id 0 ('unfilled') included")
    siglip: bool = Field(False, description="whether scale and bias start as SigLIP's; CLIP has no bias")


class ClipOutput(NamedTuple):
    """L2-normalised fp32 features, the factor on their cosines (at most 100) and, for SigLIP, the bias."""

    image_features: Tensor    # [B, E]
    text_features: Tensor     # [B, E]
    logit_scale: Tensor       # scalar
    logit_bias: Tensor | None


class ClipModel(PretrainedModel):
    """Two open_clip towers that take our pictures and our caption ids.

    Pictures may be uint8 or float in [0, 1] and of any size; they are resized and normalised in here, so that no caller
    can forget to. Captions are the ids of ``CaptionTokenizer`` (0 = unfilled).
    """

    model_type = "clip"
    Config = ClipConfig
    config: ClipConfig

    def __init__(self, config: ClipConfig):
        super().__init__(config)
        self.towers = _build_towers(config)
        self.image_size = _square_size(self.towers.visual.image_size)
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        self.register_buffer("image_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, text: Tensor) -> ClipOutput:
        """``images`` [B, 3, H, W], ``text`` [B, T] -> features for the contrastive losses."""
        scale = BoundedLogScale.apply(self.towers.logit_scale.to(_wide(self.towers.logit_scale))).exp()
        bias = self.towers.logit_bias
        return ClipOutput(self.encode_image(images), self.encode_text(text), scale, bias)

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], uint8 or float in [0, 1] -> L2-normalised features [B, E]."""
        pixels = fit_to_square(images, self.image_size, self.image_mean.dtype)
        pixels = (pixels - self.image_mean) / self.image_std
        with kernels_for(images.device).tower_attention():
            return _normalised(self.towers.encode_image(pixels))

    def encode_text(self, text: Tensor) -> Tensor:
        """[B, T] caption ids -> L2-normalised features [B, E]."""
        ids = self.wrap_captions(text)
        if torch.is_grad_enabled() and pools_the_end(self.towers):
            return _normalised(encode_ends(self.towers, ids))
        with kernels_for(text.device).tower_attention():
            return _normalised(self.towers.encode_text(ids))

    def wrap_captions(self, text: Tensor) -> Tensor:
        """[B, T] ids, 0 = unfilled -> [B, text_length + 2]: start, ids, end, zeros.

        The end token has the highest id of all, because open_clip finds the position to pool by an argmax. A caption
        longer than ``text_length`` keeps its head and still ends with the end token.
        """
        start, end = self.config.num_text_tokens, self.config.num_text_tokens + 1
        text = text[:, : self.config.text_length]
        wrapped = text.new_zeros(len(text), self.config.text_length + 2)
        wrapped[:, 0] = start
        wrapped[:, 1 : 1 + text.shape[1]] = text
        lengths = (text != 0).sum(dim=1, keepdim=True)
        return wrapped.scatter(1, lengths + 1, end)

    def embedding_parameters(self) -> list[str]:
        """Names of what an optimiser treats as embeddings: by the towers' own ``no_weight_decay``, and by ours."""
        found = set()
        for path, part in self.named_modules():
            declared = UNDECAYED | set(part.no_weight_decay() if hasattr(part, "no_weight_decay") else ())
            found |= {f"{path}.{name}" for name, _ in part.named_parameters() if name in declared}
        return sorted(found)

    def training_flops(self) -> float:
        """Floating-point operations of one pair's forward and backward pass, counted on the meta device."""
        # In training mode, because a fused inference path of torch's attention escapes the counter; two pairs, because
        # batch normalisation refuses one.
        model = deepcopy(self).to("meta").train()
        images = torch.empty(2, 3, self.image_size, self.image_size, device="meta")
        text = torch.zeros(2, self.config.text_length, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():     # the whole of the last blocks, too
            model(images, text)
        return 3 * counter.get_total_flops() / 2


class BoundedLogScale(torch.autograd.Function):
    """Keep the log of the logit scale within [0, ln 100] without trapping it there.

    A plain ``clamp`` has no gradient beyond its bound, so a scale that overshot would stay for good. Here a gradient
    that leads back inside passes, and one that leads further out is dropped.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(0, MAX_LOG_SCALE)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (log_scale,) = ctx.saved_tensors
        leads_out = ((log_scale >= MAX_LOG_SCALE) & (gradient < 0)) | ((log_scale <= 0) & (gradient > 0))
        return gradient.masked_fill(leads_out, 0)


def fit_to_square(images: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 3, H, W] uint8 or float in [0, 1] -> float [B, 3, size, size] in [0, 1].

    The shorter side is resized (bicubic, antialiased) and the longer one cropped at its centre; pictures that have the
    size already are not touched.
    """
    pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def contrastive_loss(kind: Literal["clip", "siglip"], rank: int, world_size: int) -> Callable[..., Tensor]:
    """open_clip's loss on the fields of a :class:`ClipOutput`, exact over ``world_size`` processes of equal batches.

    CLIP scores the local rows against the gathered ones, with gradient through the gather; SigLIP passes the captions
    round the ring. In both, the mean over the processes of loss and gradient is that of the global batch.
    """
    if kind == "siglip":
        return SigLipLoss(rank=rank, world_size=world_size)
    clip_loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    return lambda image, text, scale, bias: clip_loss(image, text, scale)


def known_architecture(name: str) -> dict[str, Any]:
    """A copy of the open_clip model config ``name``; ``ValueError`` with the nearest names if there is none."""
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        raise ValueError(f"open_clip has no model config {name!r}; nearest: {', '.join(near) or 'none'}")
    return deepcopy(config)


def _check_fields(section: str, given: dict[str, Any], known: type, reserved: set[str]) -> None:
    names = {field.name for field in fields(known)} - reserved
    for key in given:
        if key in reserved:
            raise ValueError(f"{section}.{key} follows from num_text_tokens and text_length: leave it out")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise ValueError(f"{section}.{key} is not a field of open_clip's {known.__name__}; nearest: {near}")
        _check_number(f"{section}.{key}", given[key], is_share=key in SHARES)
    try:
        TypeAdapter(known).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{section}.{first['loc'][0]}: {first['msg']}") from None


def _check_number(name: str, value: Any, is_share: bool) -> None:
    """open_clip's classes bound nothing: some towers of 0 or -1 layers would be built."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool) \
                and not (0 <= number < 1 if is_share else 0 < number < math.inf):
            raise ValueError(f"{name} is {number}; it is {'from 0 on and below 1' if is_share else 'above 0'}")


def _check_sizes(vision: CLIPVisionCfg, text: CLIPTextCfg, image_size: int | None) -> None:
    """``ValueError`` for widths and sides that do not divide as open_clip's own transformers need it."""
    if text.width % text.heads:
        raise ValueError(f"text.width {text.width} is not a multiple of text.heads {text.heads}")
    if vision.timm_model_name or not isinstance(vision.layers, int):       # timm's towers, and residual networks
        return
    if vision.width % vision.head_width:
        raise ValueError(f"vision.width {vision.width} is not a multiple of vision.head_width {vision.head_width}")
    side = image_size or vision.image_size
    if vision.patch_size > (side if isinstance(side, int) else min(side)):
        raise ValueError(f"vision.patch_size {vision.patch_size} is more than the picture's side, {side}")


def _build_towers(config: ClipConfig) -> nn.Module:
    """open_clip's model with our vocabulary, context length and initial scale; never downloads weights."""
    if config.architecture is not None:
        description = known_architecture(config.architecture)
    else:
        description = {"embed_dim": config.embed_dim, "vision_cfg": dict(config.vision), "text_cfg": dict(config.text)}
    text, vision = description["text_cfg"], description["vision_cfg"]
    if "multimodal_cfg" in description or text.get("hf_model_name"):
        raise ValueError(f"{config.architecture} has a text tower with a vocabulary of its own: it can rank pictures "
                         "(open_clip:...), but not be trained on our captions; choose another architecture")
    text.update(
        vocab_size=config.num_text_tokens + 2,
        context_length=config.text_length + 2,
        eos_id=config.num_text_tokens + 1,
        pad_id=0,
    )
    for tokenizer_field in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"):
        text.pop(tokenizer_field, None)
    vision["timm_model_pretrained"] = False
    if config.image_size is not None:
        vision["image_size"] = config.image_size
    description["init_logit_scale"] = SIGLIP_LOG_SCALE if config.siglip else CLIP_LOG_SCALE
    description["init_logit_bias"] = SIGLIP_BIAS if config.siglip else None
    tower_class = open_clip.CustomTextCLIP if description.pop("custom_text", False) else open_clip.CLIP
    towers = tower_class(**description)
    if vision.get("timm_model_name") and config.image_size is not None and hasattr(towers.visual, "set_input_size"):
        towers.visual.set_input_size(config.image_size)
    take_over(towers)
    return towers


def _square_size(size: int | Sequence[int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"the image tower takes {height} x {width} pictures; only square ones are supported")
    return height


def _wide(tensor: Tensor) -> torch.dtype:
    """fp64 stays (exactness tests); everything narrower becomes fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _normalised(features: Tensor) -> Tensor:
    return F.normalize(features.to(_wide(features)), dim=-1)


class OpenClipScorer(nn.Module):
    """A pretrained open_clip model with its own tokenizer and preprocessing: pictures and captions to features."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]):
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> L2-normalised features [N, E]; resized by Pillow, as in the model's own training."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        pixels = torch.stack([self.transform(picture) for picture in pictures])
        return _normalised(self.model.encode_image(pixels.to(self.device)))

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """N captions -> L2-normalised features [N, E]."""
        return _normalised(self.model.encode_text(self.tokenizer(captions).to(self.device)))


def count_tokens(tokenizer: Any, caption: str) -> int:
    """How many tokens an open_clip tokenizer makes of a caption, the marks around it counted, before it cuts them."""
    if hasattr(tokenizer, "eot_token_id"):       # open_clip's own; else one of transformers
        return len(tokenizer.encode(caption)) + 2
    return len(tokenizer.tokenizer(caption, verbose=False)["input_ids"])


def load_open_clip(name: str, weights: str | None, device: str | torch.device = "cpu") -> OpenClipScorer:
    """The open_clip model config ``name`` in fp32 with ``weights``: a pretrained tag or the path of a weights file.

    Weights are read as safetensors or with ``weights_only=True``. Raises ``ValueError`` for an unknown name or tag or a
    file that holds more than weights, ``FileNotFoundError`` for a missing file and ``RuntimeError`` when weights do not
    fit or cannot be downloaded.
    """
    known_architecture(name)
    if weights is None:
        raise ValueError(f"{name} needs weights; known: {', '.join(open_clip.list_pretrained_tags_by_model(name))}")
    if _looks_like_a_path(weights):
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no weights file {weights}")
    elif weights not in open_clip.list_pretrained_tags_by_model(name):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"open_clip has no weights {weights!r} for {name}; known: {known}")
    try:
        with no_code_from_hubs():
            model = open_clip.create_model(
                name, pretrained=weights, precision="fp32", device=device, pretrained_text=False)
            return OpenClipScorer(model, open_clip.get_tokenizer(name))
    except NOT_PLAIN_WEIGHTS as error:   # torch's own text advises to run what the file holds
        raise ValueError(f"{weights} is not a plain weights file") from error


def load_open_clip_folder(folder: str | Path, device: str | torch.device = "cpu") -> OpenClipScorer:
    """The model of a local hub folder (``open_clip_config.json`` beside its weights), in fp32.

    Raises ``ValueError`` when the folder holds no config, no weights or ones that cannot be read.
    """
    folder = Path(folder)
    if not (folder / LOCAL_FOLDER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no {LOCAL_FOLDER_CONFIG}")
    name = f"local-dir:{folder}"
    try:
        check_tokenizer_options(folder)
        with no_code_from_hubs():
            model = open_clip.create_model(
                name, precision="fp32", device=device, pretrained_text=False, require_pretrained=True)
            return OpenClipScorer(model, open_clip.get_tokenizer(name))
    except (UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{folder} holds weights that are not plain ones") from error
    except Exception as error:      # whatever a damaged or hostile folder leads open_clip and transformers to
        raise ValueError(f"{folder} is not a usable open_clip folder: {first_line(error)}") from error


def check_tokenizer_options(folder: Path) -> None:
    """``ValueError`` for options of the folder's tokenizer beyond the known ones: one of them runs code beside it."""
    description = json.loads((folder / LOCAL_FOLDER_CONFIG).read_text(encoding="utf-8"))
    options = description.get("model_cfg", {}).get("text_cfg", {}).get("tokenizer_kwargs", {})
    unknown = sorted(set(options) - TOKENIZER_OPTIONS)
    if unknown:
        raise ValueError(f"tokenizer_kwargs.{unknown[0]} of {LOCAL_FOLDER_CONFIG} is not allowed; "
                         f"allowed: {', '.join(sorted(TOKENIZER_OPTIONS))}")


@contextmanager
def no_code_from_hubs() -> Iterator[None]:
    """Refuse models and tokenizers that bring Python of their own; transformers would ask on the terminal."""
    from transformers import dynamic_module_utils

    asked_for = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = asked_for


def _looks_like_a_path(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix in {".safetensors", ".pt", ".pth", ".bin"} or Path(weights).is_file()


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
