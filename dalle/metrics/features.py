"""Pictures to features: the network that a distance between distributions looks through, by name and local file.

    inception:FILE               TensorFlow's Inception of 2015, ported (pytorch-fid's and torch-fidelity's file)
    inception-torchvision:FILE   torchvision's Inception v3
    open_clip:NAME/TAG           any tower of open_clip; also open_clip:NAME/FILE and open_clip:FOLDER
    clip:RUN_OR_FOLDER           a CLIP that was trained here

A metric's name carries the extractor's (:func:`metric_name`): ``fid-clip:quickstart`` is no FID that others report.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from dalle.errors import MissingModel, UserError
from dalle.files import file_digest
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE
from dalle.models.clip import ClipModel, OpenClipScorer, first_line, load_open_clip, load_open_clip_folder
from dalle.models.foreign import ForeignFileError, read_foreign_state
from dalle.models.inception import (
    INPUT_SIZE,
    pooled_features,
    resize_like_tensorflow,
    tensorflow_inception,
    torchvision_inception,
    unbiased_logits,
)
from dalle.pictures import to_pillow, to_signed
from dalle.store import EXPORT_FOLDER, find_model
from dalle.tensor_file import state_digest

BATCH = 64
RUN_CONFIG = "config.yaml"

OFFLINE = "without a network, use a CLIP trained here: clip:RUN_OR_FOLDER"
PUBLISHED = {
    "inception": "pt_inception-2015-12-05-6726825d.pth, published at "
                 "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    "inception-torchvision": "inception_v3_google-0cc3c7bd.pth, published at "
                             "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
}


class FeatureExtractor(Protocol):
    """What the metrics need: features of pictures, and class scores where the network has classes."""

    name: str       # for the metric's name: "inception-pytorch-fid", "open_clip:ViT-B-32/laion2b_s34b_b79k"
    digest: str     # first 16 hex digits of the SHA-256 of the weights
    resize: str     # how pictures come to the network's size
    dim: int
    classes: int    # 0: the network has none, and there is no Inception Score

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, 3, H, W] -> float32 features [N, dim] and class scores [N, K] (None without classes), on the CPU.

        One pass through the network for both.
        """
        ...

    def features(self, images: Tensor) -> Tensor: ...

    def logits(self, images: Tensor) -> Tensor | None: ...


class NetworkExtractor:
    """A function from float pictures in [0, 255] on ``device`` to features and class scores, run in batches."""

    def __init__(self, name: str, digest: str, resize: str, device: torch.device | str,
                 forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]):
        self.name, self.digest, self.resize = name, digest, resize
        self.device = torch.device(device)
        self.forward = forward
        features, logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.dim = features.shape[1]
        self.classes = 0 if logits is None else logits.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        check_pictures(images)
        parts = [self.forward(part.to(self.device)) for part in images.split(BATCH)]
        features = torch.cat([features.float().cpu() for features, _ in parts])
        if not features.isfinite().all():
            raise UserError(f"{self.name} gave features that are not finite: its weights ({self.digest}) are damaged")
        scores = [scores.float().cpu() for _, scores in parts if scores is not None]
        return features, torch.cat(scores) if scores else None

    def features(self, images: Tensor) -> Tensor:
        return self(images)[0]

    def logits(self, images: Tensor) -> Tensor | None:
        return self(images)[1]


def check_pictures(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"features are taken from uint8 pictures [N, 3, H, W], not {images.dtype} "
                         f"{list(images.shape)}")


def metric_name(metric: str, extractor: FeatureExtractor) -> str:
    """``fid`` -> ``fid-clip:quickstart``."""
    return f"{metric}-{extractor.name}"


def load_extractor(spec: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that ``spec`` names (see the module); a ``UserError`` in one line for what cannot be had."""
    kind, _, rest = spec.partition(":")
    if kind not in LOADERS:
        raise UserError(f"unknown feature extractor {spec!r}; known: {', '.join(f'{name}:...' for name in LOADERS)}")
    if not rest and kind not in PUBLISHED:
        raise UserError(f"{spec} names no model: give {USAGE[kind]}")
    return LOADERS[kind](os.path.expanduser(rest), device)      # no shell expands a ~ after the colon


def load_tensorflow_inception(path: str, device: torch.device | str) -> NetworkExtractor:
    state = inception_state("inception", path)
    network = fitted(tensorflow_inception(), state, path, "inception").to(device)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (resize_like_tensorflow(images.float()) - 128) / 128
        features = pooled_features(network, pixels)
        return features, unbiased_logits(network, features)

    return NetworkExtractor("inception-pytorch-fid", file_digest(Path(path)),
                            f"bilinear {INPUT_SIZE} as TensorFlow 1.x and torch-fidelity, no antialias",
                            device, forward)


def load_torchvision_inception(path: str, device: torch.device | str) -> NetworkExtractor:
    state = inception_state("inception-torchvision", path)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("AuxLogits.")}
    network = fitted(torchvision_inception(), state, path, "inception-torchvision").to(device)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.interpolate(images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True,
                               align_corners=False)
        features = pooled_features(network, to_signed(pixels))
        return features, network.fc(features)

    return NetworkExtractor("inception-torchvision", file_digest(Path(path)),
                            f"bilinear {INPUT_SIZE}, antialias", device, forward)


def inception_state(kind: str, path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{kind}: no weights file {path or '(none given)'}; it wants {PUBLISHED[kind]}, "
                        f"as {kind}:FILE; {OFFLINE}")
    try:
        return read_foreign_state(path)
    except ForeignFileError as error:
        raise UserError(f"{kind}: {error}; it wants {PUBLISHED[kind]}; {OFFLINE}") from error


def fitted(network: nn.Module, state: dict[str, Tensor], path: str, kind: str) -> nn.Module:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{kind}: {path} holds weights of another network; it wants {PUBLISHED[kind]}") from error
    return network.float().requires_grad_(False)


def load_open_clip_tower(rest: str, device: torch.device | str) -> NetworkExtractor:
    """Features before the normalisation, as clean-fid's and torch-fidelity's distances over CLIP take them."""
    name, _, weights = rest.partition("/")
    try:
        if Path(rest).is_dir():
            scorer, label = load_open_clip_folder(rest, device), Path(rest).name
        else:
            scorer, label = load_open_clip(name, weights or None, device), rest
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"open_clip:{rest}: {first_line(error)}; give {USAGE['open_clip']}; {OFFLINE}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"open_clip:{rest}: the weights could not be read or fetched ({first_line(error)}); they are "
                        f"published at https://huggingface.co/models?library=open_clip, give a copy as "
                        f"open_clip:{name}/FILE; {OFFLINE}") from error
    if Path(weights).is_file():
        label, digest = f"{name}/{Path(weights).stem}", file_digest(Path(weights))
    else:
        digest = state_digest(scorer.model)

    def forward(images: Tensor) -> tuple[Tensor, None]:
        return scorer.model.encode_image(pillow_pixels(scorer, images)), None

    settings = scorer.model.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    resize = f"{settings['interpolation']} {size} ({settings['resize_mode']}), Pillow, antialias"
    return NetworkExtractor(f"open_clip:{label}", digest, resize, device, forward)


def pillow_pixels(scorer: OpenClipScorer, images: Tensor) -> Tensor:
    pictures = [to_pillow(image) for image in images]
    return torch.stack([scorer.transform(picture) for picture in pictures]).to(scorer.device)


def load_own_clip(path: str, device: torch.device | str) -> NetworkExtractor:
    """A CLIP trained here; its features are unit vectors, as its loss trained them."""
    folder = find_model(path)
    if folder is None:
        raise MissingModel(f"clip:{path}: neither {EXPORT_FOLDER}/{CONFIG_FILE} nor {CONFIG_FILE} is in {path}; give "
                           "the run folder of a trained CLIP (launch/train.py configs/quickstart/clip.yaml makes one)",
                           path)
    try:
        model = ClipModel.from_pretrained(folder, device).float()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"clip:{path}: {first_line(error)}") from error

    def forward(images: Tensor) -> tuple[Tensor, None]:
        return model.encode_image(images), None

    return NetworkExtractor(f"clip:{run_name(folder)}", file_digest(folder / WEIGHTS_FILE),
                            f"bicubic {model.image_size}, antialias; not touched where the size fits",
                            device, forward)


def run_name(folder: Path) -> str:
    """``quickstart`` for the model of the run ``quickstart/clip``, by its config or else by its folder."""
    run = folder.parent if folder.name == EXPORT_FOLDER else folder
    try:
        name = yaml.safe_load((run / RUN_CONFIG).read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        name = run.resolve().name
    return str(name).removesuffix("/clip")


LOADERS = {
    "inception": load_tensorflow_inception,
    "inception-torchvision": load_torchvision_inception,
    "open_clip": load_open_clip_tower,
    "clip": load_own_clip,
}
USAGE = {
    "open_clip": "open_clip:NAME/TAG, open_clip:NAME/FILE or open_clip:FOLDER",
    "clip": "clip:RUN_OR_FOLDER",
}
