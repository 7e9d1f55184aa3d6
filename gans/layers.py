"""What the systems are built of: blocks that two or more of them share, with the sizes as arguments.

Normalisation is BatchNorm with PyTorch's defaults, LeakyReLU has the slope 0.2, and a convolution before a
normalisation has no bias, unless a system's own file says otherwise.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from dalle.models.precision import at_least_single
from gans.losses import kl_log_sigma, kl_logvar

SLOPE = 0.2

Activation = Callable[[], nn.Module] | None


# -- convolutions

def conv1(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def conv3(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def conv4(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    """Halves height and width."""
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)


def deconv(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """Doubles height and width."""
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)


def leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE)


def relu() -> nn.ReLU:
    return nn.ReLU()


def sequence(*layers: nn.Module | None) -> nn.Sequential:
    """The layers that are there, in order."""
    return nn.Sequential(*(layer for layer in layers if layer is not None))


def down(inputs: int, outputs: int, norm: bool = True, activation: Activation = leaky,
         bias: bool = False) -> nn.Sequential:
    """[B, inputs, H, W] -> [B, outputs, H/2, W/2]."""
    return sequence(conv4(inputs, outputs, bias), nn.BatchNorm2d(outputs) if norm else None,
                    activation and activation())


def same(inputs: int, outputs: int, activation: Activation = leaky, norm: bool = True,
         bias: bool = False) -> nn.Sequential:
    """[B, inputs, H, W] -> [B, outputs, H, W]."""
    return sequence(conv3(inputs, outputs, bias), nn.BatchNorm2d(outputs) if norm else None,
                    activation and activation())


def up(inputs: int, outputs: int, activation: Activation = relu) -> nn.Sequential:
    """[B, inputs, H, W] -> [B, outputs, 2H, 2W], by nearest neighbours and a convolution."""
    return sequence(nn.Upsample(scale_factor=2), conv3(inputs, outputs), nn.BatchNorm2d(outputs),
                    activation and activation())


def up_glu(inputs: int, outputs: int) -> nn.Sequential:
    """:func:`up` with a gated linear unit: half of the channels gate the other half."""
    return nn.Sequential(nn.Upsample(scale_factor=2), conv3(inputs, 2 * outputs), nn.BatchNorm2d(2 * outputs),
                         nn.GLU(dim=1))


# -- residual blocks

class Residual(nn.Module):
    """x + body(x), then ``after``."""

    def __init__(self, body: nn.Module, after: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.body(x))


def residual_relu(channels: int) -> Residual:
    """Two 3x3 convolutions at one width; ReLU after the sum."""
    return Residual(nn.Sequential(conv3(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(),
                                  conv3(channels, channels), nn.BatchNorm2d(channels)), nn.ReLU())


def residual_glu(channels: int) -> Residual:
    """Two 3x3 convolutions with a gated linear unit between them; nothing after the sum."""
    return Residual(nn.Sequential(conv3(channels, 2 * channels), nn.BatchNorm2d(2 * channels), nn.GLU(dim=1),
                                  conv3(channels, channels), nn.BatchNorm2d(channels)))


def bottleneck(channels: int, middle: int, activation: Callable[[], nn.Module], after: nn.Module | None = None,
               bias: bool = False) -> Residual:
    """1x1 to ``middle``, 3x3, 3x3 back to ``channels``; ``after`` the sum."""
    return Residual(nn.Sequential(
        conv1(channels, middle, bias), nn.BatchNorm2d(middle), activation(),
        conv3(middle, middle, bias), nn.BatchNorm2d(middle), activation(),
        conv3(middle, channels, bias), nn.BatchNorm2d(channels)), after)


# -- text and pictures

def tile(vector: Tensor, size: int) -> Tensor:
    """[B, D] -> [B, D, size, size]: the same at every place."""
    return vector[:, :, None, None].expand(-1, -1, size, size)


def join(features: Tensor, vector: Tensor) -> Tensor:
    """[B, C, S, S] and [B, D] -> [B, C + D, S, S]."""
    return torch.cat([features, tile(vector, features.shape[-1])], dim=1)


class Augmented(NamedTuple):
    """A condition drawn around a caption: ``condition`` and ``mean`` [B, d], and the spread that the law is told by."""

    condition: Tensor
    mean: Tensor
    spread: Tensor       # log sigma or log sigma^2, see ConditioningAugmentation


class ConditioningAugmentation(nn.Module):
    """c = mu(t) + sigma(t) eps (arXiv 1612.03242, section 3.2): a caption stands for a region, not a point.

    ``activation`` says which of the three published forms: ``lrelu`` (StackGAN's TensorFlow code, SISGAN, HDGAN, TAGAN:
    the second half is log sigma), ``relu`` (StackGAN's PyTorch code) and ``glu`` (StackGAN++, AttnGAN), where it is
    log sigma^2.
    """

    def __init__(self, sentence_dim: int, dim: int, activation: Literal["lrelu", "relu", "glu"] = "lrelu",
                 bias: bool = True):
        super().__init__()
        self.dim, self.law = dim, activation
        self.project = nn.Linear(sentence_dim, (4 if activation == "glu" else 2) * dim, bias=bias)
        self.activation = {"lrelu": leaky, "relu": relu, "glu": lambda: nn.GLU(dim=1)}[activation]()

    def forward(self, sentence: Tensor, eps: Tensor) -> Augmented:
        """[B, sentence_dim] and standard normal [B, dim]."""
        mean, spread = self.activation(self.project(sentence)).chunk(2, dim=1)
        sigma = spread.exp() if self.law == "lrelu" else (0.5 * spread).exp()
        return Augmented(mean + sigma * eps, mean, spread)

    def centre(self, sentence: Tensor) -> Tensor:
        """[B, sentence_dim] -> [B, dim]: the mean of the law around each caption."""
        return self(sentence, sentence.new_zeros(len(sentence), self.dim)).mean

    def kl(self, augmented: Augmented) -> Tensor:
        """KL(N(mu, sigma^2) || N(0, 1)), the mean over batch and dimensions."""
        divergence = kl_log_sigma if self.law == "lrelu" else kl_logvar
        return divergence(at_least_single(augmented.mean), at_least_single(augmented.spread))


# -- first weights

def dcgan_init(module: nn.Module, linear: bool = False) -> None:
    """Convolutions from N(0, 0.02), gains from N(1, 0.02), offsets 0; linear layers too where asked."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) or (linear and isinstance(part, nn.Linear)):
            nn.init.normal_(part.weight, 0.0, 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, _BatchNorm) and part.affine:
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)


def orthogonal_init(module: nn.Module) -> None:
    """Orthogonal convolutions and linear layers, gains from N(1, 0.02); biases of convolutions stay as they are."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.orthogonal_(part.weight, 1.0)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, _BatchNorm) and part.affine:
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)


def he_init(module: nn.Module, slope: float = 0.0) -> None:
    """Weights by He et al. (arXiv 1502.01852) for ReLU, leaky by ``slope``, and offsets 0: without normalisation a
    signal keeps its size. An output of a transposed convolution reads only (kernel / stride)^2 of its kernel."""
    gain = (2 / (1 + slope ** 2)) ** 0.5
    for part in module.modules():
        if isinstance(part, nn.ConvTranspose2d):
            read = part.in_channels * part.kernel_size[0] * part.kernel_size[1] / (part.stride[0] * part.stride[1])
        elif isinstance(part, (nn.Conv2d, nn.Linear)):
            read = part.weight[0].numel()
        else:
            continue
        nn.init.normal_(part.weight, 0.0, gain / read ** 0.5)
        nn.init.zeros_(part.bias)


# -- classes

def one_hot(indices: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[...] of 0 to ``count`` - 1 -> [..., count]; torch's own looks at the values first, where they are on a CPU."""
    return (indices[..., None] == torch.arange(count, device=indices.device)).to(dtype)


# -- over a whole network

class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics are those of the batches of all processes; on every device, the CPU included."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch normalisation takes [B, C, ...], not {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = torch.full((), float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)                       # processes may hold different numbers of rows
        wide = x if x.dtype == torch.float64 else x.float()
        mean = all_reduce(wide.sum(axes)) / count
        variance = all_reduce((wide - mean.view(shape)).square().sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = (wide - mean.view(shape)) * (variance.view(shape) + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def synchronised(module: nn.Module) -> nn.Module:
    """``module`` with every BatchNorm over all processes; names of parameters and buffers stay."""
    if isinstance(module, _BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
        new = SynchronisedBatchNorm(module.num_features, module.eps, module.momentum, module.affine,
                                    module.track_running_stats)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            setattr(new, name, tensor)      # the very same: frozen or not, with its type and its device
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronised(child))
    return module


def spectrally_normalised(module: nn.Module) -> nn.Module:
    """``module`` with the largest singular value of every convolution and linear layer held at 1 (arXiv 1802.05957).

    Those that are held already stay as they are.
    """
    for part in list(module.modules()):
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and not is_parametrized(part):
            parametrizations.spectral_norm(part)
    return module
