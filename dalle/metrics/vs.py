"""Visual-semantic similarity (arXiv 1802.09178, section 4.1): how near a picture lies to the caption it was made of.

It is measured by a trained VS model together with the frozen networks whose features it maps; only values of one such
model can be compared.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.base import PretrainedModel, read_description
from dalle.models.clip import ClipModel
from dalle.models.vs import InceptionResNetFeatures, VSModel
from dalle.store import TOKENIZER_FOLDER
from dalle.words import one_line

# The parts of an exported VS model. A CLIP that gives both kinds of features is saved once, as the text's.
IMAGE_FOLDER, TEXT_FOLDER = "image", "text"
IMAGE_NETWORKS: dict[str, type[PretrainedModel]] = {kind.model_type: kind for kind in (ClipModel,
                                                                                      InceptionResNetFeatures)}
TEXT_NETWORKS: dict[str, type[PretrainedModel]] = {ClipModel.model_type: ClipModel}
BATCH = 64


class VSScorer(nn.Module):
    """The two maps with the networks and the tokenizer that they were trained behind, in fp32."""

    def __init__(self, maps: VSModel, image: nn.Module, text: ClipModel, tokenizer: CaptionTokenizer):
        super().__init__()
        self.maps, self.image, self.text, self.tokenizer = maps, image, text, tokenizer
        self.float().eval()

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """uint8 [N, 3, H, W] and N captions -> fp32 [N] on the CPU."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
        device, length = next(self.maps.parameters()).device, self.text.config.text_length
        parts = []
        for start in range(0, len(images), BATCH):
            ids = [self.tokenizer.encode(caption, length) for caption in captions[start : start + BATCH]]
            texts = self.text.encode_text(torch.from_numpy(np.stack(ids)).to(device))
            pictures = self.image.encode_image(images[start : start + BATCH].to(device))
            seen, said = self.maps(pictures, texts)
            parts.append((seen * said).sum(dim=1).cpu())
        return torch.cat(parts) if parts else torch.empty(0)


def vs_similarity(scorer: VSScorer, images: Tensor, captions: Sequence[str]) -> tuple[float, float]:
    """Mean and population standard deviation of the cosine of each picture and its exact caption."""
    return mean_and_deviation(scorer.cosines(images, captions))


def mean_and_deviation(cosines: Tensor) -> tuple[float, float]:
    """The figures of :func:`vs_similarity`, where the cosines were measured in parts."""
    if not len(cosines):
        raise ValueError("no pictures to measure the similarity of")
    values = cosines.double()
    return float(values.mean()), float(values.std(correction=0))


def load_vs(folder: str | Path, device: torch.device | str = "cpu") -> VSScorer:
    """The exported model folder of a VS run; ``UserError`` in one line for anything else."""
    folder = Path(folder)
    text_folder = folder / TEXT_FOLDER
    maps = load_part(folder, {VSModel.model_type: VSModel})
    text = load_part(text_folder, TEXT_NETWORKS)
    image = load_part(folder / IMAGE_FOLDER, IMAGE_NETWORKS) if (folder / IMAGE_FOLDER).is_dir() else text
    if not (text_folder / TOKENIZER_FOLDER).is_dir():
        raise UserError(f"{text_folder} has no {TOKENIZER_FOLDER}/: export the VS run again")
    return VSScorer(maps, image, text, CaptionTokenizer.load(text_folder / TOKENIZER_FOLDER)).to(device)


def load_part(folder: Path, kinds: dict[str, type[PretrainedModel]]) -> PretrainedModel:
    """The model in ``folder``, which must be of one of ``kinds``."""
    try:
        kind = read_description(folder).get("model_type")
        if kind not in kinds:
            raise UserError(f"{folder} holds a {kind!r} model, not {' or '.join(map(repr, kinds))}")
        return kinds[kind].from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {one_line(error)}") from error
