"""Inception v3 (arXiv 1512.00567) as two sets of published weights want it: TensorFlow's, ported, and torchvision's.

The network that FID was defined with (arXiv 1706.08500) is TensorFlow's of 2015-12-05. Its average pools leave the
padding out of the count, its last block pools by maximum, it has 1008 classes, and its resize takes no care of pixel
centres. The port of the weights is pytorch-fid's; torch-fidelity publishes the same file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception3
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

INPUT_SIZE = 299
TENSORFLOW_CLASSES = 1008


class UncountedPadding:
    """Replaces the average pool at the end of a torchvision block, which counts zeros of the padding as values."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)
        return [*branches, self.branch_pool(self.pool(x))]

    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class TensorflowA(UncountedPadding, InceptionA):
    pass


class TensorflowC(UncountedPadding, InceptionC):
    pass


class TensorflowE(UncountedPadding, InceptionE):
    pass


class TensorflowLast(UncountedPadding, InceptionE):
    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def tensorflow_inception() -> Inception3:
    """The network of ``pt_inception-2015-12-05-6726825d.pth``, by the names of that file; its weights are random."""
    blocks = [BasicConv2d, TensorflowA, InceptionB, TensorflowC, InceptionD, TensorflowE, InceptionAux]
    network = Inception3(TENSORFLOW_CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
    network.Mixed_7c = TensorflowLast(in_channels=2048)
    return network.eval()


def torchvision_inception() -> Inception3:
    """The network of ``inception_v3_google-0cc3c7bd.pth`` without its auxiliary head; its weights are random."""
    return Inception3(aux_logits=False, init_weights=False).eval()


def pooled_features(network: Inception3, pixels: Tensor) -> Tensor:
    """float [N, 3, 299, 299] in [-1, 1] -> [N, 2048], what the classifier sees."""
    x = pixels
    for name, layer in network.named_children():
        if name in ("dropout", "fc"):
            break
        x = layer(x)
    return x.flatten(1)


def unbiased_logits(network: nn.Module, features: Tensor) -> Tensor:
    """Class scores without the bias, which is what the published Inception Scores (arXiv 1606.03498) were made with."""
    return features @ network.fc.weight.T


def resize_like_tensorflow(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """float [N, C, H, W] -> [N, C, size, size]: TensorFlow 1's ``resize_bilinear``.

    Output pixel i lies at i * H / size: the corners are aligned neither at the centres nor at the edges, so torch's
    own ``interpolate`` gives other values in every pixel, and another FID.
    """
    rows, columns = (taps(length, size, images) for length in images.shape[-2:])
    images = lerp(images, 2, *rows)
    return lerp(images, 3, *columns)


def taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.arange(size, dtype=like.dtype, device=like.device) * torch.tensor(length / size, dtype=like.dtype)
    low = places.long()
    return low, (low + 1).clamp_max(length - 1), places - low


def lerp(images: Tensor, axis: int, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    weight = weight[:, None] if axis == 2 else weight
    start = images.index_select(axis, low)
    return start + (images.index_select(axis, high) - start) * weight
