"""The visual-semantic similarity of HDGAN (arXiv 1802.09178, section 4.1): two linear maps over frozen features.

The paper's sizes are 1536 (Inception-ResNet-v2), 1024 (char-CNN-RNN) and 512. Values of two trained maps cannot be
compared with each other.
"""

import math
from pathlib import Path
from typing import ClassVar

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dalle.models.base import ModelConfig, PretrainedModel
from dalle.models.foreign import read_foreign_state

MARGIN = 0.2


class VSConfig(ModelConfig):
    """Lengths of the two kinds of features and of the space that they are mapped into."""

    image_dim: int = Field(default=1536, ge=1, description="numbers of a picture's features")
    text_dim: int = Field(default=1024, ge=1, description="numbers of a caption's features")
    embed_dim: int = Field(default=512, ge=1, description="dimensions of the common space")


class VSModel(PretrainedModel):
    """Pictures' and captions' features, each by one linear map onto one sphere."""

    model_type = "vs"
    Config = VSConfig
    config: VSConfig

    def __init__(self, config: VSConfig):
        super().__init__(config)
        self.image = linear_map(config.image_dim, config.embed_dim)
        self.text = linear_map(config.text_dim, config.embed_dim)

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, image_dim], [N, text_dim] -> two L2-normalised [N, embed_dim]."""
        return F.normalize(self.image(image_features), dim=-1), F.normalize(self.text(text_features), dim=-1)


def linear_map(inputs: int, outputs: int) -> nn.Linear:
    """Weights from N(0, 6 / (inputs + outputs)), no offset: Xavier's bound as a deviation, as HDGAN's code has it."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=math.sqrt(6 / (inputs + outputs)))
    nn.init.zeros_(layer.bias)
    return layer


def vs_ranking_loss(similarity: Tensor, margin: float = MARGIN) -> Tensor:
    """The bidirectional ranking loss on ``similarity`` [B, B] (pictures by captions, pairs on the diagonal).

    L = sum_{i != j} max(0, margin - S_ii + S_ij) + max(0, margin - S_jj + S_ij): a sum, every other pair a negative.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"the ranking loss takes a square matrix of similarities, not {list(similarity.shape)}")
    pairs = similarity.diagonal()
    captions = (margin - pairs[:, None] + similarity).clamp(min=0)      # for each picture, the other captions
    pictures = (margin - pairs[None, :] + similarity).clamp(min=0)      # for each caption, the other pictures
    mismatched = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return ((captions + pictures) * mismatched).sum()


class InceptionResNetConfig(ModelConfig):
    """The side of the square that pictures are resized to."""

    image_size: int = Field(default=299, ge=75, description="side that pictures are resized to, in pixels")


class InceptionResNetFeatures(PretrainedModel):
    """Inception-ResNet-v2 (arXiv 1602.07261) up to its average pool, of timm: pictures to 1536 numbers."""

    model_type = "inception_resnet_v2"
    Config = InceptionResNetConfig
    config: InceptionResNetConfig
    dim: ClassVar[int] = 1536

    def __init__(self, config: InceptionResNetConfig):
        super().__init__(config)
        self.network = timm.create_model("inception_resnet_v2", pretrained=False, num_classes=0)

    @classmethod
    def load(cls, weights: str | Path | None = None, image_size: int = 299) -> "InceptionResNetFeatures":
        """With the ImageNet weights of timm's hub, or of a local file of the same names; a classifier is left out.

        Raises ``ForeignFileError`` or ``RuntimeError`` for a file that does not hold them, and what the hub raises.
        """
        model = cls(InceptionResNetConfig(image_size=image_size))
        if weights is None:
            state = timm.create_model("inception_resnet_v2.tf_in1k", pretrained=True, num_classes=0).state_dict()
        else:
            state = read_foreign_state(weights)
        features = {name: tensor for name, tensor in state.items() if not name.startswith("classif.")}
        model.network.load_state_dict(features)
        return model.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """[N, 3, H, W], uint8 or float in [0, 1] -> [N, 1536]."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        size = (self.config.image_size, self.config.image_size)
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        return self.network((pixels - 0.5) / 0.5)
