"""PPGN (Nguyen et al., arXiv 1612.00005): a chain of codes, each a step likelier to be painted as what is asked for.

The noiseless joint PPGN-h. A frozen encoder E (``gans/ppgn_encoder.py``) sees a picture as a code h; a generator G
learns to paint the picture again from its code alone. To paint a caption, a chain begins at a random code and climbs
(equation 11):

    h <- clip(h + lr_t d / mean|d|),   d = e1 (E(G(h)) - h) + e2 dlogC(y|G(h))/dh + N(0, e3^2)

The first term is towards what codes of pictures are like, the second towards the condition y, which any network C may
judge that no one trained with G: here E's own classes, a captioner's likelihood of the caption, or a CLIP.

As in the released sampling code: clipped into 0..30, and of the class's log-probability only the way through its own
logit counts, (1 - p_y) of it (``class_gradient: softmax`` takes the whole gradient). No code of the training was
released: G is trained as DeePSiM is (arXiv 1602.02644), by squared errors of the picture and of its features, pool5 and
fc6, and by a discriminator that is told the code. Its layers and weights are recalled, not checked against that paper;
the weights are settings.

Not as released: RGB in [-1, 1] in place of BGR less the mean picture, so that the squared error of a picture counts
127.5^2 times as much; where the discriminator is far ahead its loss counts nothing, while Adam's moments still move it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import CONFIG_FILE, ModelConfig
from dalle.models.precision import at_least_single, full_precision
from dalle.store import model_folder, model_kind
from dalle.training.optimizers import Betas
from dalle.training.task import Batch, Loss, Networks
from gans.classes import LITERAL, ClassCheck, ClassPrototypes, named_classes
from gans.clip_text import ClipTextEncoder
from gans.generator import Noise, Painter
from gans.layers import he_init
from gans.looking import scales_picture
from gans.losses import bce
from gans.outputs import Painted
from gans.ppgn_chain import CaptionChainConfig, ChainConfig, class_log_likelihood, climb, noise_of_chains
from gans.ppgn_encoder import Features, PPGNEncoder
from gans.sizes import ImageSize, SentenceDim
from gans.stream import Stream
from gans.task import GanBatch, GANOptimizer, GANRun, GANTask, filled, load_encoder
from gans.text import Text

SLOPE = 0.3                     # of every LeakyReLU
SHOWN = 7                       # pictures of a chain: the start, and steps at equal distances
SEED_NUMBERS = 2                # of a chain's own noise
COMPANIONS = ("encoder", "captioner", "clip")      # folders beside an exported generator, too


# -- the generator

class PPGNConfig(ModelConfig):
    """Sizes of the generator, the paper's by default, and how its chains climb."""

    image_size: ImageSize = Field(default=256, ge=4)
    code_dim: int = Field(default=4096, ge=1, description="numbers in the code h; follows from the encoder")
    num_classes: int = Field(default=1000, ge=2, description="classes of the encoder; follows from it")
    sentence_dim: SentenceDim = Field(default=1024, description="numbers in the prototype of a class; follows from the "
                                      "text encoder")
    stem_channels: int = Field(default=256, ge=1, description="channels of the first map, which the last of three "
                               "linear layers makes")
    channels: tuple[tuple[PositiveInt, ...], ...] = Field(
        default=((256, 512), (256, 256), (128, 128), (64,), (32,)), min_length=1,
        description="of each doubling of the side: the channels behind it, and those behind each convolution after it; "
                    "one more doubling ends in the picture")
    class_gradient: Literal["target", "softmax"] = Field(
        default="target", description="of a class's log-probability: the way through its own logit alone, as released, "
                                      "or the whole gradient", json_schema_extra=FREE)
    by_class: ChainConfig = Field(default=ChainConfig(), description="chains towards a class", json_schema_extra=FREE)
    by_caption: CaptionChainConfig = Field(default=CaptionChainConfig(), description="chains towards what a captioner "
                                           "would say", json_schema_extra=FREE)
    by_clip: CaptionChainConfig = Field(default=CaptionChainConfig(), description="chains towards what a CLIP finds "
                                        "like the caption", json_schema_extra=FREE)

    @property
    def start_size(self) -> int:
        """The side of the first map."""
        return self.image_size >> (len(self.channels) + 1)

    @model_validator(mode="after")
    def _doubles_to_the_size(self) -> "PPGNConfig":
        doublings = len(self.channels) + 1
        if self.start_size < 1 or self.start_size << doublings != self.image_size:
            raise ValueError(f"the first map is doubled {doublings} times, which does not end at {self.image_size} "
                             f"pixels: give a multiple of {1 << doublings}, or another number of channels")
        return self


class Companions(NamedTuple):
    """The frozen networks that a chain is led by."""

    encoder: PPGNEncoder
    captioner: Stream | None = None
    clip: ClipTextEncoder | None = None

    @property
    def conditions(self) -> list[str]:
        """What may be asked for; the first is the default for captions."""
        return [name for name, network in (("caption", self.captioner), ("clip", self.clip), ("class", self.encoder))
                if network is not None]


class PPGNGenerator(Painter):
    """G: a code to a picture; with the prototypes that give a caption its class. ``companions`` are no part of it."""

    model_type = "ppgn"
    Config = PPGNConfig
    config: PPGNConfig

    def __init__(self, config: PPGNConfig):
        super().__init__(config)
        start = config.start_size
        widths = [config.code_dim] * 3 + [config.stem_channels * start ** 2]
        self.stem = nn.Sequential(*(layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), leaky())),
                                  nn.Unflatten(1, (config.stem_channels, start, start)))
        layers, before = [], config.stem_channels
        for doubled, *others in config.channels:
            layers += [doubling(before, doubled), leaky()]
            for inputs, outputs in pairwise([doubled, *others]):
                layers += [nn.ConvTranspose2d(inputs, outputs, 3, padding=1), leaky()]
            before = [doubled, *others][-1]
        self.body = nn.Sequential(*layers, doubling(before, 3))
        self.prototypes = ClassPrototypes(config.num_classes, config.sentence_dim)
        self.companions: Companions | None = None
        he_init(self, SLOPE)

    @property
    def noise_dims(self) -> dict[str, int]:
        """Where a chain begins, and what its own noise follows from."""
        return {"h": self.config.code_dim, "chain": SEED_NUMBERS}

    def forward(self, code: Tensor) -> Tensor:
        """h [B, code_dim] -> [B, 3, S, S]; real pictures are in [-1, 1], but nothing holds these there."""
        return self.body(self.stem(code))

    # -- sampling

    def options(self, **given: Any) -> dict[str, Any]:
        """``condition`` (caption, clip or class, as the model has companions), and how its chain climbs
        (:class:`ChainConfig`)."""
        known = self.companions.conditions
        condition = given.pop("condition", known[0])
        if condition not in known:
            raise UserError(f"condition {condition!r} is not one of this model: {', '.join(known)}")
        chain = getattr(self.config, f"by_{condition}").model_dump()
        for name in given:
            if name not in chain:
                raise UserError(f"{name} is not an option of a {self.model_type} model: condition, {', '.join(chain)}")
        try:
            chosen = ChainConfig.model_validate(chain | given)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{first['loc'][0]}={first['input']}: {first['msg']}") from error
        return {"condition": condition, **chosen.model_dump()}

    def conditions(self, captions: Sequence[str], text: Text | None, condition: str, **chain: Any) -> dict[str, Any]:
        """``log_condition``, pictures [B, 3, S, S] -> [B], and ``chain``, how it climbs."""
        judge = {"class": self.by_class, "caption": self.by_caption, "clip": self.by_clip}[condition]
        named = named_classes(captions, self.config.num_classes)
        if condition != "class" and (named >= 0).any():
            raise UserError("a prompt names a class: ask with --option condition=class")
        return {"log_condition": judge(captions, text, named), "chain": ChainConfig(**chain)}

    def by_class(self, captions: Sequence[str], text: Text | None, named: Tensor) -> Callable[[Tensor], Tensor]:
        """log p of the class that a prompt names, otherwise of the nearest prototype's."""
        class_id = named.to(self.device)
        if (named < 0).any():
            if text is None or not self.prototypes.count.any():
                raise UserError("this PPGN has seen no captions, so it knows its classes by number alone: ask for "
                                f"class:0 to class:{self.config.num_classes - 1}, or train it with a text_encoder")
            class_id = torch.where(class_id < 0, self.prototypes.nearest(text.sentence), class_id)
        encoder, alone = self.companions.encoder, self.config.class_gradient == "target"
        return lambda images: class_log_likelihood(encoder(images).classes, class_id, alone)

    def by_caption(self, captions: Sequence[str], text: Text | None, named: Tensor) -> Callable[[Tensor], Tensor]:
        """log p of the caption's words, one after the other, summed."""
        captioner = self.companions.captioner
        ids = captioner.ids(captions)
        return lambda images: captioner.log_likelihood(images, ids)

    def by_clip(self, captions: Sequence[str], text: Text | None, named: Tensor) -> Callable[[Tensor], Tensor]:
        """The scaled cosine of picture and caption, which a CLIP takes for a log-likelihood but for a constant."""
        clip = self.companions.clip
        features, scale = clip(captions).sentence, clip.model.towers.logit_scale.detach().exp()
        return lambda images: scale * (clip.model.encode_image((images + 1) / 2) * features).sum(dim=1)

    @property
    def device(self) -> torch.device:
        return self.body[-1].weight.device

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text | None, **conditions: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The last picture of each chain, and ``chain`` [B, SHOWN, 3, S, S], some of those on the way to it."""
        settings: ChainConfig = conditions["chain"]
        with full_precision(self.device):
            chain = climb(noise["h"], self, lambda images: self.companions.encoder(images).code,
                          conditions["log_condition"], noise_of_chains(noise["chain"], self.config.code_dim),
                          **settings.model_dump(exclude={"final_fraction"}),
                          lr_end=settings.lr * settings.final_fraction)
            wanted = {round(settings.steps * part / (SHOWN - 1)) for part in range(SHOWN)}
            codes = [code for step, code in enumerate(chain) if step in wanted]
            images = torch.stack([self(code) for code in codes], dim=1)
        return images[:, -1], {"chain": images}

    def pictures(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        """``chain``: the start and the pictures on the way, side by side."""
        return {"chain": scales_picture(list(values["chain"]))}

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """What no text encoder reads, a captioner or a CLIP may."""
        readers = [reader for reader in self.companions[1:] if reader is not None]
        return readers[0].warnings(captions) if readers else super().caption_warnings(captions)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """With the companions in the folders beside its weights."""
        network = super().from_pretrained(folder, device)
        places = {name: Path(folder) / name for name in COMPANIONS}
        network.companions = load_companions(device=device, **{
            name: str(place) for name, place in places.items()
            if name == "encoder" or (place / CONFIG_FILE).is_file()})
        return network


def leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE)


def doubling(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """[B, inputs, H, W] -> [B, outputs, 2H, 2W]."""
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)


def load_companions(encoder: str, captioner: str | None = None, clip: str | None = None,
                    device: str | torch.device = "cpu") -> Companions:
    """By their runs or model folders."""
    reader = None
    if clip is not None:
        folder = model_folder(clip)
        if (kind := model_kind(folder)) != ClipTextEncoder.model_type:
            raise UserError(f"clip: {clip} holds a {kind!r} model, not {ClipTextEncoder.model_type!r}: give the folder "
                            f"of a {ClipTextEncoder.model_type} run")
        reader = ClipTextEncoder.load(folder).to(device)
    return Companions(PPGNEncoder.load(encoder, device), captioner and Stream.load(captioner, device), reader)


# -- the discriminator

class PPGNDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """DeePSiM's."""

    layers: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = Field(
        default=((7, 4, 32), (5, 1, 64), (3, 2, 128), (3, 1, 256), (3, 2, 256)), min_length=1,
        description="kernel, stride and channels of each convolution")
    code_dims: tuple[PositiveInt, ...] = Field(default=(1024, 512), min_length=1, description="outputs of the linear "
                                               "layers over the code")
    hidden_dim: int = Field(default=512, ge=1, description="outputs of the linear layer over both")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of what that layer reads, and of what it makes, "
                           "set to 0 in training", json_schema_extra=FREE)


class PPGNDiscriminator(nn.Module):
    """Is a picture the real one of its code? The mean over the picture's places, and the code, to one logit."""

    def __init__(self, config: PPGNDiscriminatorConfig, code_dim: int):
        super().__init__()
        layers, before = [], 3
        for kernel, stride, channels in config.layers:
            layers += [nn.Conv2d(before, channels, kernel, stride, padding=kernel // 2), leaky()]
            before = channels
        self.places = nn.Sequential(*layers)
        self.code = nn.Sequential(*(layer for pair in pairwise((code_dim, *config.code_dims))
                                    for layer in (nn.Linear(*pair), leaky())))
        self.head = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(before + config.code_dims[-1], config.hidden_dim), leaky(),
            nn.Dropout(config.dropout), nn.Linear(config.hidden_dim, 1))
        he_init(self, SLOPE)

    def forward(self, image: Tensor, code: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, code_dim] -> logits [B]."""
        seen = self.places(image).mean(dim=(2, 3))
        return self.head(torch.cat([seen, self.code(code)], dim=1)).squeeze(1)


# -- the losses

def squared_error(made: Tensor, real: Tensor) -> Tensor:
    """||made - real||^2 of each sample, mean over the batch: a sum over pixels or features, as in DeePSiM."""
    return (at_least_single(made) - at_least_single(real)).square().flatten(1).sum(dim=1).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x, h) - log(1 - D(G(h), h))."""
    return bce(real, 1) + bce(fake, 0)


def generator_loss(fake: Tensor, *terms: tuple[float, Tensor], adversarial: float = 1.0) -> Tensor:
    """-log D(G(h), h) and each squared error, each times its weight."""
    return adversarial * bce(fake, 1) + sum(weight * term for weight, term in terms)


# -- training

class PPGNOptimizer(GANOptimizer):
    """DeePSiM's Adam."""

    betas: Betas = Field(default=(0.9, 0.999), description="of Adam: the share that each of its two moving averages, "
                         "of the gradient and of its square, keeps in a step")


class PPGNLossConfig(Section, json_schema_extra=FREE):
    """DeePSiM's weights, of sums over pixels and features; its 2e-6 of a picture from 0 to 255 is 0.0325 here."""

    image: float = Field(default=2e-6 * 127.5 ** 2, ge=0, description="weight of the squared error of the picture")
    pooled: float = Field(default=0.01, ge=0, description="weight of the squared error of pool5")
    code: float = Field(default=0.01, ge=0, description="weight of the squared error of fc6")
    adversarial: float = Field(default=100.0, ge=0, description="weight of the adversarial term")
    pause: float = Field(default=0.1, ge=0, description="the discriminator's loss counts nothing where it is less than "
                         "so much of the generator's; 0: it always counts")


class PPGNRun(GANRun):
    """A PPGN's run. ``text_encoder`` is for captions under ``condition=class``: without one it takes ``class:N`` alone.
    """

    task: Literal["ppgn"] = Field(default="ppgn", description="the kind of run: a PPGN")
    encoder: str = Field(description="run or model folder of a ppgn_encoder; frozen", json_schema_extra=FREE)
    captioner: str | None = Field(default=None, description="run or model folder of a captioner (stream), which chains "
                                  "are led by; frozen", json_schema_extra=FREE)
    clip: str | None = Field(default=None, description="run or model folder of a CLIP, which chains are led by; frozen",
                             json_schema_extra=FREE)
    generator: PPGNConfig = Field(default=PPGNConfig(), description="sizes of the generator, and how chains climb")
    discriminator: PPGNDiscriminatorConfig = Field(default=PPGNDiscriminatorConfig(),
                                                   description="sizes of the discriminator")
    loss: PPGNLossConfig = Field(default=PPGNLossConfig(), description="weights of the loss's terms")
    generator_optimizer: PPGNOptimizer = Field(default=PPGNOptimizer(), description="how the generator's weights move")
    discriminator_optimizer: PPGNOptimizer = Field(default=PPGNOptimizer(),
                                                   description="how the discriminator's weights move")

    @model_validator(mode="after")
    def _previews_can_be_painted(self) -> "PPGNRun":
        named = all(map(LITERAL.fullmatch, self.preview.captions))
        if self.train.preview_every and not self.reads_captions and not named:
            raise ValueError("without a captioner, a clip or a text_encoder the model takes no captions: set "
                             "preview.captions to class:0, class:1 and the like")
        return self

    @property
    def reads_captions(self) -> bool:
        return any(name is not None for name in (self.text_encoder, self.captioner, self.clip))

    @property
    def makes_pairs(self) -> bool:
        return False


class PPGNBatch(GanBatch, total=False):
    """With what the encoder sees in the pictures."""

    seen: Features


class PPGNTask(GANTask):
    """Pictures are painted again from their codes; both players judge the same ones."""

    paints_once = capturable = True
    companion_settings: ClassVar[Mapping[str, str]] = {"text": "text_encoder", **{name: name for name in COMPANIONS}}
    config: PPGNRun

    def __init__(self, config: PPGNRun):
        text = load_encoder(config) if config.text_encoder is not None else None
        companions = load_companions(config.encoder, config.captioner, config.clip)
        seen = companions.encoder.config
        if seen.image_size != config.data.image_size:
            raise UserError(f"encoder: {config.encoder} sees pictures of {seen.image_size} px, data.image_size is "
                            f"{config.data.image_size}; set it to {seen.image_size}")
        length = {} if text is None else {"sentence_dim": text.sentence_dim}
        settings = filled(config.generator, image_size=seen.image_size, code_dim=seen.code_dim,
                          num_classes=seen.num_classes, **length)
        generator = PPGNGenerator(settings)
        generator.companions = companions
        self.needs_classes = text is not None
        self.check = ClassCheck("PPGN", "encoder's num_classes", settings.num_classes)
        frozen = {name: network for name, network in companions._asdict().items() if network is not None}
        self.assemble(config, generator, PPGNDiscriminator(config.discriminator, settings.code_dim), text, frozen)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> PPGNBatch:
        """Also takes the captions into the class prototypes."""
        prepared: PPGNBatch = super().prepare(batch, networks, step)
        if "text" in prepared:
            exchange = self.exchange(networks)
            self.network.prototypes.add(exchange.everyone(prepared["text"].sentence),
                                        self.check(exchange.everyone(batch["class_id"])))
        return {**prepared, "seen": networks.bare("encoder")(prepared["image"])}

    def draw(self, *arguments: Any) -> Noise:
        """None: what is painted in training are the codes of pictures, as they are."""
        return {}

    def paint(self, networks: Networks, batch: PPGNBatch, step: int) -> Painted:
        return Painted([networks["generator"](batch["seen"].code)], None)

    def d_loss(self, networks: Networks, batch: PPGNBatch, step: int) -> Loss:
        score, code = networks["discriminator"], batch["seen"].code
        real, fake = score(batch["image"], code), score(batch["painted"].image, code)
        loss = discriminator_loss(real, fake)
        counts = self.counts(networks, loss.detach(), bce(fake.detach(), 1))
        return Loss(counts * loss, {"judged": loss.detach(), "counts": counts})

    def counts(self, networks: Networks, discriminator: Tensor, generator: Tensor) -> Tensor:
        """0 where the discriminator's loss over the whole batch is too small beside the generator's, else 1."""
        of_all = networks.all_reduce_mean(torch.stack([discriminator, generator]))
        return (of_all[0] >= self.config.loss.pause * of_all[1]).float()

    def g_loss(self, networks: Networks, batch: PPGNBatch, step: int) -> Loss:
        image, real, weights = batch["painted"].image, batch["seen"], self.config.loss
        made, fake = networks["encoder"](image), networks["discriminator"](image, real.code)
        terms = {"image": squared_error(image, batch["image"]), "pooled": squared_error(made.pooled, real.pooled),
                 "code": squared_error(made.code, real.code)}
        weighted = [(getattr(weights, name), term) for name, term in terms.items()]
        return Loss(generator_loss(fake, *weighted, adversarial=weights.adversarial),
                    {"adversarial": bce(fake, 1).detach(), **{name: term.detach() for name, term in terms.items()}})

    def real_scores(self, discriminator: Callable[..., Any], batch: PPGNBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["seen"].code)]

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """Also each companion, in a folder of its own: all that sampling needs."""
        super().export(folder, states)
        for name in COMPANIONS:
            if name in self.frozen:
                network = self.frozen[name]
                save = network.save_pretrained if name == "encoder" else network.save
                save(Path(folder) / name)
