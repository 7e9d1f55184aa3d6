"""SD-GAN (arXiv 1904.01480): a contrastive loss keeps what all captions of a picture agree on, and normalisations that
the caption sets keep what is its own in each.

Two branches of the same weights paint two captions at a time. Pictures of two captions of one picture are to look alike
to the discriminators, those of captions of two pictures are not. The gains and offsets of the normalisations in the
upsampling layers follow the sentence, or at each place the words that fit it (SCBN). Under that lies AttnGAN's network
with AttnGAN's losses (``gans/attention.py``, ``gans/refining.py``), the sum of both branches'.

No code was released, and no source says all. Chosen here: sentences set the layers before the first picture and words
those of the refinements; what moves gains and offsets is zero at first, so that training starts from plain
normalisation; pictures are compared by a linear map of each discriminator's mean features, which learns by the
contrastive loss in the discriminators' phase, too, while the rest of them does not; half of the pairs are of one
picture; each branch has its own noise; AttnGAN's matching loss stays, with its weight.

Both branches are painted as one batch of twice as many samples, so that the same statistics normalise both: else the
branches would not be one function of a caption, and pairs would also differ by the batch that each is in. A running
statistic moves once a step, as in AttnGAN. Means over that batch, times two, are the sums over the branches; a wrong
pair or a mismatch of the matching loss may be of the other branch, but is never a picture's other caption.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.models.precision import at_least_single, full_precision
from dalle.training.gathering import in_global_order_with_gradient
from dalle.training.task import Batch, Loss, Networks
from gans.attention import Refinement, global_attention
from gans.generator import Noise
from gans.layers import conv1, conv3
from gans.refining import (
    MatchingBatch,
    MatchingLossConfig,
    MatchingRun,
    MatchingTask,
    RefiningConfig,
    RefiningGenerator,
    ScaleDiscriminator,
    ScaleDiscriminatorsConfig,
    Start,
)
from gans.task import Exchange, other_samples, pyramid, step_generator
from gans.text import Text, two_different

BRANCHES = 2
PAIR_STREAM = 300           # of a step's random numbers
BEYOND_CLASSES = 1 << 32    # numbers that no class_id has


# -- semantic-conditioned batch normalisation

class SCBN(nn.Module):
    """BN(x | c) = (gamma + gamma_c) (x - mu) / sigma + (beta + beta_c): a caption c moves gains and offsets.

    ``cue``: channels -> what makes gamma_c and beta_c of the normalised map and the text; None: plain normalisation.
    """

    def __init__(self, channels: int, cue: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.normalise = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.offset = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.cue = cue(channels) if cue else None
        self.reset()

    def reset(self) -> None:
        """First weights: gains and offsets as the normalisations of AttnGAN begin, moved by no caption."""
        nn.init.normal_(self.gain, 1.0, 0.02)
        nn.init.zeros_(self.offset)
        if self.cue is not None:
            for last in self.cue.last_layers():
                nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """[B, channels, H, W], the same again."""
        normalised = self.normalise(x)
        gain, offset = self.gain[:, None, None], self.offset[:, None, None]
        if self.cue is not None:
            more_gain, more_offset = self.cue(normalised, text)
            gain, offset = gain + more_gain, offset + more_offset
        return (gain * normalised + offset).to(x.dtype)


class SentenceCue(nn.Module):
    """gamma_c and beta_c [B, channels, 1, 1] of the sentence, the same at every place: a hidden layer each."""

    def __init__(self, sentence_dim: int, hidden: int, channels: int):
        super().__init__()
        self.gain, self.offset = (nn.Sequential(nn.Linear(sentence_dim, hidden), nn.ReLU(),
                                                nn.Linear(hidden, channels, bias=False)) for _ in range(2))

    def last_layers(self) -> list[nn.Module]:
        return [self.gain[-1], self.offset[-1]]

    def forward(self, normalised: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        return tuple(part(text.sentence)[:, :, None, None] for part in (self.gain, self.offset))


class WordCue(nn.Module):
    """gamma_c and beta_c [B, channels, H, W] of the words, of each place those that fit it."""

    def __init__(self, word_dim: int, channels: int):
        super().__init__()
        self.to_values = conv1(word_dim, channels)      # f
        self.gain, self.offset = conv1(channels, channels), conv1(channels, channels)

    def last_layers(self) -> list[nn.Module]:
        return [self.gain, self.offset]

    def forward(self, normalised: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        embedding, _ = self.embed(normalised, text)
        return self.gain(embedding), self.offset(embedding)

    def embed(self, normalised: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """vse_j = sum_t softmax_t(v_j f(w_t)) f(w_t) [B, channels, H, W] of the normalised map v, and the weights of
        the words [B, T, H, W]."""
        values = self.to_values(text.words[..., None])[..., 0]
        return global_attention(normalised, values, text.mask)


class UpSCBN(nn.Module):
    """``layers.up_glu`` with the text: [B, inputs, H, W] -> [B, outputs, 2H, 2W]."""

    def __init__(self, inputs: int, outputs: int, cue: Callable[[int], nn.Module] | None):
        super().__init__()
        self.enlarge = nn.Sequential(nn.Upsample(scale_factor=2), conv3(inputs, 2 * outputs))
        self.norm = SCBN(2 * outputs, cue)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        return F.glu(self.norm(self.enlarge(x), text), dim=1)


# -- the generator

class SDGANConfig(RefiningConfig):
    """Sizes of the generator; the defaults are AttnGAN's for CUB."""

    sentence_level: bool = Field(default=True, description="whether the sentence sets the normalisations before the "
                                 "first picture")
    word_level: bool = Field(default=True, description="whether the words set the normalisations of the refinements, "
                             "place by place")
    cue_hidden: int = Field(default=256, ge=1, description="numbers between the sentence and the gains that it sets")


class SDGANGenerator(RefiningGenerator):
    """AttnGAN's with SCBN in the upsampling layers; one branch and the other are calls of it."""

    model_type = "sdgan"
    Config = SDGANConfig
    config: SDGANConfig

    def __init__(self, config: SDGANConfig):
        super().__init__(config)
        for part in self.modules():
            if isinstance(part, SCBN):
                part.reset()            # what is zero at first is not orthogonal

    def beginning(self) -> nn.Module:
        sizes = self.config
        cue = (lambda channels: SentenceCue(sizes.sentence_dim, sizes.cue_hidden, channels)) \
            if sizes.sentence_level else None
        return SemanticStart(sizes.condition_dim + sizes.z_dim, sizes.width, sizes.sides[0],
                             lambda inputs, outputs: UpSCBN(inputs, outputs, cue))

    def refinement(self, level: int) -> nn.Module:
        sizes = self.config
        cue = (lambda channels: WordCue(sizes.word_dim, channels)) if sizes.word_level else None
        return SemanticRefinement(sizes.width, sizes.word_dim, sizes.residuals,
                                  lambda inputs, outputs: UpSCBN(inputs, outputs, cue))

    def first_map(self, condition: Tensor, noise: Noise, text: Text) -> Tensor:
        return self.start(torch.cat([condition, noise["z"]], dim=1), text)


class SemanticStart(Start):
    """F_0, whose doublings also read the text."""

    def forward(self, x: Tensor, text: Text) -> Tensor:
        h = self.project(x)
        for up in self.grow:
            h = up(h, text)
        return h


class SemanticRefinement(Refinement):
    """A refinement whose doubling also reads the text."""

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        refined, attention = self.attend(h, text)
        return self.grow(refined, text), attention


# -- the discriminators

class SiameseScores(NamedTuple):
    """As :class:`gans.outputs.Scores`, and the vectors by which pictures are compared."""

    matched: Tensor | None
    mismatched: Tensor | None
    alone: Tensor | None
    vector: Tensor              # fp32 [N, D]


class SiameseDiscriminator(ScaleDiscriminator):
    """AttnGAN's, and a linear map of its mean features, without the offset that a difference does not see."""

    def __init__(self, side: int, sentence_dim: int, width: int, vector_dim: int):
        super().__init__(side, sentence_dim, width, unconditional=True)
        self.project = nn.Linear(8 * width, vector_dim, bias=False)
        nn.init.orthogonal_(self.project.weight)

    def forward(self, image: Tensor, sentence: Tensor, other_sentence: Tensor | None = None,
                only_project: bool = False) -> SiameseScores:
        """Pictures [N, 3, side, side] and sentences [N, D] or, of several captions of each, [k N, D], first those of
        all pictures' first captions. ``only_project``: the vectors teach the map to them alone."""
        features = self.features(image)
        pooled = at_least_single(features).mean(dim=(2, 3))
        with full_precision(image.device):      # bf16 would round away distances as small as alpha
            vector = self.project(pooled.detach() if only_project else pooled)
        captions = len(sentence) // len(image)
        return SiameseScores(*self.scores(features.repeat(captions, 1, 1, 1), sentence, other_sentence), vector)


class SiameseDiscriminators(nn.Module):
    """One discriminator for each side of picture, as one player."""

    def __init__(self, sides: Sequence[int], sentence_dim: int, width: int = 64, vector_dim: int = 256):
        super().__init__()
        self.scales = nn.ModuleList(SiameseDiscriminator(side, sentence_dim, width, vector_dim) for side in sides)

    def forward(self, images: Sequence[Tensor], sentence: Tensor, other_sentence: Tensor | None = None,
                only_project: bool = False) -> list[SiameseScores]:
        return [scale(image, sentence, other_sentence, only_project)
                for scale, image in zip(self.scales, images, strict=True)]


# -- the contrastive loss

def distances(first: Tensor, second: Tensor) -> Tensor:
    """d = ||v_1 - v_2|| [N] of vectors [N, D]; without gradient where they are the same."""
    return torch.linalg.vector_norm(at_least_single(first) - at_least_single(second), dim=1)


def contrastive_loss(first: Tensor, second: Tensor, same: Tensor, alpha: float = 0.1, eps: float = 1.0,
                     scale: float | None = None) -> Tensor:
    """L_c of pairs of vectors [N, D]; ``same`` bool [N]: both captions are of one picture.

    The mean over the pairs of ``scale`` (max(d, alpha)^2 where they are the same, else max(eps - d, 0)^2). ``scale``
    None: 1 / (2 D), once for each pair: the paper's sum over n is of a distance that has no n. Nearer than alpha,
    nothing draws two pictures together; the paper's first version has no alpha (0).
    """
    d = distances(first, second)
    near, far = (alpha + F.relu(d - alpha)).square(), F.relu(eps - d).square()
    return (0.5 / first.shape[1] if scale is None else scale) * torch.where(same, near, far).mean()


# -- training

class SDGANDiscriminatorsConfig(ScaleDiscriminatorsConfig):
    """Sizes of the discriminators; the defaults are AttnGAN's for CUB."""

    vector_dim: int = Field(default=256, ge=1, description="numbers in the vectors by which pictures are compared")


class SDGANLossConfig(MatchingLossConfig):
    """Weights, and what is a pair to the contrastive loss."""

    contrastive: float = Field(default=1.0, ge=0, description="weight of the contrastive loss, the sum over the "
                               "pictures' sides")
    scale: float | None = Field(default=None, gt=0, description="of a pair's term; null: 1 over twice the length of "
                                "the vectors; 0.5: as if that were 1")
    alpha: float = Field(default=0.1, ge=0, description="distance below which two pictures of one are left as they are")
    eps: float = Field(default=1.0, gt=0, description="distance beyond which pictures of two are left as they are")
    intra: float = Field(default=0.5, ge=0, le=1, description="share of the pairs that are two captions of one "
                         "picture; the others are of two pictures, of different classes where there are such")


class SDGANRun(MatchingRun):
    """An SD-GAN run; it needs ``data.num_captions``."""

    task: Literal["sdgan"] = Field(default="sdgan", description="the kind of run: an SD-GAN")
    generator: SDGANConfig = Field(default=SDGANConfig(), description="sizes of the generator")
    discriminator: SDGANDiscriminatorsConfig = Field(default=SDGANDiscriminatorsConfig(),
                                                     description="sizes of the discriminators")
    loss: SDGANLossConfig = Field(default=SDGANLossConfig(), description="the terms beside the adversarial ones")

    @model_validator(mode="after")
    def _captions_are_pairs(self) -> "SDGANRun":
        if self.data.num_captions < 2:
            raise ValueError("SD-GAN paints two captions of each picture: set data.num_captions to 2 or more; they "
                             "are drawn with repetition, and the first one that differs is taken")
        return self

    @property
    def reads_several_captions(self) -> bool:
        return True


class SDGANBatch(MatchingBatch, total=False):
    """Twice as many samples, [2 b, ...]: all pictures with their first captions, then again with their second ones."""

    partner: Tensor         # int64 [B], of each of the global batch: whose second caption its first is compared with
    kind: Tensor            # int64 [2 b]: samples of one kind are no mismatch to the matching model


class SDGANTask(MatchingTask):
    """Both branches' losses, and the contrastive one: to the generator, and to the discriminators' maps."""

    Generator = SDGANGenerator
    config: SDGANRun

    def make_discriminator(self, config: SDGANRun, sizes: SDGANConfig) -> nn.Module:
        return SiameseDiscriminators(sizes.picture_sides, sizes.sentence_dim, config.discriminator.width,
                                     config.discriminator.vector_dim)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> SDGANBatch:
        exchange, classes = self.exchange(networks), batch["class_id"]
        drawn = zip(batch["caption"], batch["captions"], strict=True)
        firsts, seconds = zip(*(two_different([one, *others]) for one, others in drawn), strict=True)
        both: Batch = {"image": torch.cat(BRANCHES * [batch["image"]]), "class_id": torch.cat(BRANCHES * [classes]),
                       "caption": [*firsts, *seconds]}
        return {**super().prepare(both, networks, step), "partner": self.pairs(exchange, classes, step),
                "kind": torch.cat(BRANCHES * [self.kinds(exchange, classes)])}

    def pairs(self, exchange: Exchange, classes: Tensor, step: int) -> Tensor:
        """int64 [B]: for ``loss.intra`` of the global batch itself, for the others another sample; all at random."""
        classes = exchange.everyone(classes)
        source, count = step_generator(self.config.seed, step, PAIR_STREAM), len(classes)
        is_intra = torch.randperm(count, generator=source) < round(self.config.loss.intra * count)
        others = other_samples(classes, True, source)
        return torch.where(is_intra.to(classes.device, non_blocking=True),
                           torch.arange(count, device=classes.device), others)

    def kinds(self, exchange: Exchange, classes: Tensor) -> Tensor:
        """int64 [b]: a picture's class or, where it has none or ``loss.same_class`` counts it for nothing, a number of
        its own."""
        own = exchange.mine(torch.arange(exchange.size(len(classes)), device=classes.device)) + BEYOND_CLASSES
        return torch.where(classes >= 0, classes, own) if self.config.loss.same_class == "left_out" else own

    def d_loss(self, networks: Networks, batch: SDGANBatch, step: int) -> Loss:
        discriminator, sentence = networks["discriminator"], batch["text"].sentence
        other, share = self.shifted(networks, batch)
        once = batch["image"][:len(batch["image"]) // BRANCHES]         # for both captions
        real = discriminator(pyramid(once, self.network.config.picture_sides), sentence, other)
        fake = discriminator(batch["painted"].images, sentence, only_project=True)
        return self.compared(networks, batch, fake, self.d_loss_of(real, fake, share))

    def g_loss(self, networks: Networks, batch: SDGANBatch, step: int) -> Loss:
        fake = networks["discriminator"](batch["painted"].images, batch["text"].sentence)
        return self.compared(networks, batch, fake, self.g_loss_of(networks, batch, fake))

    def compared(self, networks: Networks, batch: SDGANBatch, scores: Sequence[SiameseScores], mean: Loss) -> Loss:
        """The sum of the branches' losses, of which ``mean`` is the mean, and the contrastive one.

        That is of the global batch, the same on every process. ``of_one`` and ``of_two`` in the log: the distance of
        pairs of one picture and of two, as the last discriminator sees them.
        """
        settings, partner = self.config.loss, batch["partner"]
        same = partner == torch.arange(len(partner), device=partner.device)
        total = 0
        for score in scores:
            first, second = in_global_order_with_gradient(score.vector, networks.world_size).chunk(BRANCHES)
            total = total + contrastive_loss(first, second[partner], same, settings.alpha, settings.eps,
                                             settings.scale)
        between = distances(first, second[partner]).detach()
        of_one, of_two = ((between * mask).sum() / mask.sum().clamp(min=1) for mask in (same, ~same))
        return Loss(BRANCHES * mean.total + settings.contrastive * total,
                    {**mean.parts, "contrastive": total.detach(), "of_one": of_one, "of_two": of_two})

    def alike(self, batch: SDGANBatch) -> Tensor:
        """Captions of other pictures are mismatches, whosever branch they are of."""
        return batch["kind"]
