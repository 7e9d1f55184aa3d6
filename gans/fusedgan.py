"""FusedGAN (arXiv 1801.05551): an unconditional and a conditional generator on top of one map, the structure prior.

G_s makes the map M_s of noise: the posture. G_u paints it without a caption, G_c with one: the style. Both pairs of
generator and discriminator train G_s, by turns (section 3), so pictures without captions teach it, too: D_u sees all
pictures, or a pool of its own (``unpaired``), D_c those that are ``labelled``.

No code was published. The alternating pairs, each with its own z, and a D_c that sees no mismatched pairs are the
paper's by its descriptions; ``joint_g`` (one step of G_s on both losses) and ``matching_aware`` are the other ways. The
sizes are this project's reading: G_s of two doublings to 16 x 16, a KL term of weight 1.

G_s, G_u and G_c are players of their own. Adam moves a parameter whose gradient is zero by what it remembers, so in
one player G_c would drift in every step of G_u. A pair's generator step is therefore two phases with one loss and
the same noise: first the branch moves, then G_s, through the branch that has just moved. Nothing else ever moves.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.data.dataset import ShardDataset
from dalle.data.index import ShardIndex
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.pictures import to_bytes, to_signed
from dalle.training.task import Batch, Loss, Networks, Phase, Player
from gans.generator import GANGenerator, Noise, Painter
from gans.layers import ConditioningAugmentation, conv1, conv3, dcgan_init, deconv, join, leaky, residual_relu
from gans.looking import unit
from gans.losses import bce
from gans.outputs import Painted
from gans.sizes import ConditionDim, ImageSize, NoiseDim, SentenceDim
from gans.stackgan import SMALLEST, doublings, halving, power_of_two
from gans.task import Exchange, GanBatch, GANRun, GANTask, filled, load_encoder, made_ready
from gans.text import Text

REFINED = 4                # the map's side, in times that it is smaller than the picture's
WIDEST = 8                 # channels at the first map, in widths
ANSWERS = {"yes": True, "true": True, "no": False, "false": False}


# -- section 3: the structure prior and the two generators on it

class FusedGANConfig(ModelConfig):
    """Sizes of the three generators."""

    image_size: ImageSize = Field(default=64, ge=1)
    sentence_dim: SentenceDim = 1024
    z_dim: NoiseDim = 100
    condition_dim: ConditionDim = 128
    width: int = Field(default=128, ge=1, description="channels at half of the picture's side; the structure prior has "
                       "twice as many, the first map up to eight times")
    residuals: int = Field(default=2, ge=0, description="residual blocks of the conditional generator")

    @model_validator(mode="after")
    def _doubles_to_the_size(self) -> "FusedGANConfig":
        power_of_two(self.image_size, REFINED * SMALLEST, "image_size")
        return self

    def channels(self, side: int) -> int:
        """Of a map of this side."""
        return self.width * min(self.image_size // (2 * side), WIDEST)

    @property
    def structure_side(self) -> int:
        return self.image_size // REFINED


def grow(inputs: int, outputs: int) -> nn.Sequential:
    """[B, inputs, S, S] -> [B, outputs, 2S, 2S]."""
    return nn.Sequential(deconv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU())


def brush(config: FusedGANConfig) -> list[nn.Module]:
    """The last two doublings: a map of the structure prior's size to a picture."""
    half = config.image_size // 2
    return [grow(config.channels(config.structure_side), config.channels(half)), deconv(config.channels(half), 3),
            nn.Tanh()]


class StructurePrior(nn.Sequential):
    """G_s: z [B, Z] -> M_s [B, 2 width, S/4, S/4]."""

    def __init__(self, config: FusedGANConfig):
        first = config.channels(SMALLEST)
        layers: list[nn.Module] = [nn.Linear(config.z_dim, first * SMALLEST ** 2),
                                   nn.Unflatten(1, (first, SMALLEST, SMALLEST)), nn.BatchNorm2d(first), nn.ReLU()]
        side = SMALLEST
        while side < config.structure_side:
            layers.append(grow(config.channels(side), config.channels(2 * side)))
            side *= 2
        super().__init__(*layers)


class UnconditionalGenerator(nn.Sequential):
    """G_u: M_s -> a picture [B, 3, S, S] in [-1, 1]."""

    def __init__(self, config: FusedGANConfig):
        super().__init__(*brush(config))


class ConditionalGenerator(nn.Module):
    """G_c: M_s and a condition drawn around a caption -> a picture [B, 3, S, S] in [-1, 1]."""

    def __init__(self, config: FusedGANConfig):
        super().__init__()
        channels = config.channels(config.structure_side)
        self.augmentation = ConditioningAugmentation(config.sentence_dim, config.condition_dim, "lrelu")
        self.fuse = nn.Sequential(conv3(channels + config.condition_dim, channels), nn.BatchNorm2d(channels), nn.ReLU(),
                                  *(residual_relu(channels) for _ in range(config.residuals)))
        self.brush = nn.Sequential(*brush(config))

    def forward(self, structure: Tensor, sentence: Tensor, eps: Tensor) -> Painted:
        augmented = self.augmentation(sentence, eps)
        return Painted([self.brush(self.fuse(join(structure, augmented.condition)))], augmented)


class FusedGANGenerator(Painter):
    """All three: paints a caption, or with ``unconditional`` the same posture without one."""

    model_type = "fusedgan"
    Config = FusedGANConfig
    config: FusedGANConfig

    def __init__(self, config: FusedGANConfig):
        super().__init__(config)
        self.structure = StructurePrior(config)
        self.unconditional = UnconditionalGenerator(config)
        self.conditional = ConditionalGenerator(config)
        dcgan_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.z_dim, "eps": self.config.condition_dim}

    def forward(self, noise: Noise, sentence: Tensor) -> Painted:
        return self.conditional(self.structure(noise["z"]), sentence, noise["eps"])

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text, unconditional: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x_c, and beside it x_u of the same M_s; where ``unconditional`` is given, x_u."""
        structure = self.structure(noise["z"])
        alone = self.unconditional(structure)
        if unconditional is not None:
            return alone, {}
        return self.conditional(structure, text.sentence, noise["eps"]).image, {"unconditional": alone}

    def options(self, unconditional: str | bool = False, **given: Any) -> dict[str, Any]:
        """``unconditional``: whether to paint without the caption, yes or no."""
        super().options(**given)
        answer = unconditional if isinstance(unconditional, bool) else ANSWERS.get(unconditional.lower())
        if answer is None:
            raise UserError(f"--option unconditional={unconditional}: write yes or no")
        return {"unconditional": answer}

    def conditions(self, captions: Sequence[str], text: Text | None, unconditional: bool = False) -> dict[str, Tensor]:
        return {"unconditional": torch.ones(len(captions), dtype=torch.bool)} if unconditional else {}

    def pictures(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        """``unconditional``: the posture without the caption."""
        return {name: to_bytes(unit(picture)) for name, picture in values.items()}


# -- the discriminators

class FusedGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of both discriminators."""

    width: int = Field(default=64, ge=1, description="channels after the first halving, twice as many after each")
    text_dim: int = Field(default=128, ge=1, description="numbers that D_c projects the sentence to")


def widths(config: FusedGANDiscriminatorConfig, image_size: int) -> list[int]:
    """Channels after each halving down to 4 x 4."""
    return [config.width * 2 ** level for level in range(doublings(image_size))]


class UnconditionalDiscriminator(nn.Sequential):
    """D_u: is a picture real? [B, 3, S, S] -> logits [B]."""

    def __init__(self, config: FusedGANDiscriminatorConfig, image_size: int):
        channels = widths(config, image_size)
        super().__init__(halving(channels), nn.Conv2d(channels[-1], 1, SMALLEST), nn.Flatten(0))
        dcgan_init(self)


class ConditionalDiscriminator(nn.Module):
    """D_c: is a picture real, and its caption's? The caption joins the features at 4 x 4."""

    def __init__(self, config: FusedGANDiscriminatorConfig, image_size: int, sentence_dim: int):
        super().__init__()
        channels = widths(config, image_size)
        self.trunk = halving(channels)
        self.text = nn.Sequential(nn.Linear(sentence_dim, config.text_dim), leaky())
        self.head = nn.Sequential(conv1(channels[-1] + config.text_dim, channels[-1]), nn.BatchNorm2d(channels[-1]),
                                  leaky(), nn.Conv2d(channels[-1], 1, SMALLEST), nn.Flatten(0))
        dcgan_init(self)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, D] -> logits [B]."""
        return self.head(join(self.trunk(image), self.text(sentence)))


# -- the losses

def discriminator_loss(real: Tensor, fake: Tensor, wrong: Tensor | None = None) -> Tensor:
    """Of either pair: -log D(x) - log(1 - D(x')); mismatched pairs share the second half with the fakes."""
    if wrong is None:
        return bce(real, 1) + bce(fake, 0)
    return bce(real, 1) + 0.5 * (bce(wrong, 0) + bce(fake, 0))


def generator_loss(fake: Tensor, kl: Tensor | float = 0.0, lambda_kl: float = 1.0) -> Tensor:
    """Of either pair, non-saturating: -log D(x') + lambda KL; there is no KL without a caption."""
    return bce(fake, 1) + lambda_kl * kl


# -- the run

class FusedGANLossConfig(Section, json_schema_extra=FREE):
    """Weights, and which of the paper's ways are taken."""

    kl: float = Field(default=1.0, ge=0, description="weight of the augmentation's divergence")
    matching_aware: bool = Field(default=False, description="D_c also sees pictures with captions of others, as fakes; "
                                 "not in the paper")


class FusedGANRun(GANRun):
    """A FusedGAN run."""

    task: Literal["fusedgan"] = Field(default="fusedgan", description="the kind of run: a FusedGAN")
    generator: FusedGANConfig = Field(default=FusedGANConfig(), description="sizes of the three generators")
    discriminator: FusedGANDiscriminatorConfig = Field(default=FusedGANDiscriminatorConfig(),
                                                       description="sizes of both discriminators")
    loss: FusedGANLossConfig = Field(default=FusedGANLossConfig(), description="weights of the losses, and their form")
    joint_g: bool = Field(default=False, description="one step of the structure prior on the losses of both pairs, "
                          "after both discriminators; false: the pairs take turns")
    labelled: float = Field(default=1.0, ge=0, le=1, description="share of the pictures whose captions are known, by "
                            "their keys; D_c and G_c see no others, and with 0 do not learn")
    unpaired: str | None = Field(default=None, json_schema_extra=FREE,
                                 description="shards of pictures for D_u, in an order of their own, data.train or "
                                             "others; null: all pictures of the batch, labelled or not")

    @property
    def makes_pairs(self) -> bool:
        return self.loss.matching_aware


class FusedGANBatch(GanBatch, total=False):
    """``image``, ``text`` and ``noise`` are the conditional pair's: of labelled pictures, again and again where not all
    are."""

    unpaired: Tensor          # [b, 3, S, S] as ``image``: the unconditional pair's
    noise_u: Noise            # its own; no eps is used of it
    labelled: Tensor          # bool [b]: where not all pictures are
    any_labelled: Tensor      # 0-d: whether there is a labelled picture in the global batch; else 0


class FusedGANTask(GANTask):
    """The unconditional pair, then the conditional one: its discriminator, its branch, the structure prior."""

    capturable = True
    config: FusedGANRun

    def __init__(self, config: FusedGANRun):
        self.config = config
        encoder = load_encoder(config)
        sizes = filled(config.generator, image_size=config.data.image_size, sentence_dim=encoder.sentence_dim)
        judges = {"discriminator_u": UnconditionalDiscriminator(config.discriminator, sizes.image_size),
                  "discriminator_c": ConditionalDiscriminator(config.discriminator, sizes.image_size,
                                                              encoder.sentence_dim)}
        self._network = made_ready(config, FusedGANGenerator(sizes))
        self.players = {
            **{name: Player(self._network.get_submodule(name), config.generator_optimizer)
               for name in ("structure", "unconditional", "conditional")},
            **{name: Player(made_ready(config, judge, judges=True), config.discriminator_optimizer)
               for name, judge in judges.items()}}
        self.frozen = {"text": encoder}
        self.wrong_texts = "rolled" if config.loss.matching_aware else None
        self.phases = self.joint_phases() if config.joint_g else [*self.phases_of("u"), *self.phases_of("c")]
        self._pool = None if config.unpaired is None else unpaired_pool(config.data, config.unpaired, config.seed)

    # -- who moves when

    def phases_of(self, pair: Literal["u", "c"], structure: bool = True) -> list[Phase]:
        """A pair's turn; the conditional pair has none where nothing is labelled."""
        if pair == "c" and not self.config.labelled:
            return []
        judge, branch, d_loss, g_loss, r1_loss = (
            ("discriminator_u", "unconditional", self.d_loss_u, self.g_loss_u, self.r1_loss_u) if pair == "u" else
            ("discriminator_c", "conditional", self.d_loss_c, self.g_loss_c, self.r1_loss_c))
        phases = [Phase(judge, judge, d_loss, capturable=True)]
        if self.config.stabiliser.r1:
            phases.append(Phase(f"r1_{pair}", judge, r1_loss, self.config.stabiliser.r1_every, capturable=True))
        phases.append(Phase(branch, branch, g_loss, capturable=True))
        return phases + [Phase(f"structure_{pair}", "structure", g_loss, capturable=True)] * structure

    def joint_phases(self) -> list[Phase]:
        """Both discriminators, both branches, and the structure prior once, on the sum."""
        phases = [*self.phases_of("u", structure=False), *self.phases_of("c", structure=False)]
        judges = [phase for phase in phases if phase.player.startswith("discriminator")]
        return [*judges, *(phase for phase in phases if phase not in judges),
                Phase("structure", "structure", self.joint_g_loss, capturable=True)]

    @property
    def network(self) -> FusedGANGenerator:
        """All three generators: made of the players' own modules."""
        return self._network

    def generator(self, networks: Networks) -> GANGenerator:
        return GANGenerator(self._network, networks.bare("text"))

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        whole = {f"{part}.{name}": value for part in ("structure", "unconditional", "conditional")
                 for name, value in states[part].items()}
        super().export(folder, {"generator": whole})

    # -- what a step is made of

    def on_host(self, batch: Batch, step: int) -> Batch:
        if not 0 < self.config.labelled < 1:
            return batch
        known = [is_labelled(key, self.config.labelled, self.config.seed) for key in batch["key"]]
        return {**batch, "labelled": torch.tensor(known)}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> FusedGANBatch:
        prepared: FusedGANBatch = super().prepare(batch, networks, step)
        exchange, device = self.exchange(networks), batch["image"].device
        own = len(batch["image"])
        prepared["noise_u"] = self.draw(exchange, own, step, 2, device)
        prepared["unpaired"] = prepared["image"]
        if self._pool is not None:
            count = exchange.size(own)
            places = exchange.mine(torch.arange(step * count, (step + 1) * count))
            prepared["unpaired"] = to_signed(self._pool.fetch(places.tolist())["image"].to(device, non_blocking=True))
        prepared["any_labelled"] = torch.ones((), device=device)
        if "labelled" in batch:
            prepared |= self.labelled_part(exchange, prepared, batch["labelled"])
        return prepared

    def labelled_part(self, exchange: Exchange, prepared: FusedGANBatch, labelled: Tensor) -> FusedGANBatch:
        """What the conditional pair has in the place of pictures without captions: those with, from the first again."""
        known = exchange.everyone(labelled)
        order = known.int().argsort(descending=True, stable=True)
        places = torch.arange(len(known), device=known.device)
        number = known.sum().clamp(min=1)

        def chosen(values: Tensor, shift: int = 0) -> Tensor:
            return exchange.everyone(values)[exchange.mine(order[(places + shift) % number])]

        text = prepared["text"]
        part: FusedGANBatch = {"labelled": labelled, "any_labelled": known.any().float(),
                               "image": chosen(prepared["image"]), "text": Text(*map(chosen, text))}
        if "wrong_text" in prepared:
            part["wrong_text"] = Text(*(chosen(values, 1) for values in text))
        return part

    # -- what the players learn by

    def d_loss_u(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        with torch.no_grad():
            painted = networks["unconditional"](networks["structure"](batch["noise_u"]["z"]))
        real, fake = map(networks["discriminator_u"], (batch["unpaired"], painted))
        return Loss(discriminator_loss(real, fake), probabilities(real=real, fake=fake))

    def g_loss_u(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        painted = networks["unconditional"](networks["structure"](batch["noise_u"]["z"]))
        return Loss(generator_loss(networks["discriminator_u"](painted)))

    def conditional(self, networks: Networks, batch: FusedGANBatch) -> Painted:
        noise = batch["noise"]
        return networks["conditional"](networks["structure"](noise["z"]), batch["text"].sentence, noise["eps"])

    def d_loss_c(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        judge, sentence = networks["discriminator_c"], batch["text"].sentence
        with torch.no_grad():
            painted = self.conditional(networks, batch)
        logits = {"real": judge(batch["image"], sentence), "fake": judge(painted.image, sentence)}
        if "wrong_text" in batch:
            logits["wrong"] = judge(batch["image"], batch["wrong_text"].sentence)
        return Loss(batch["any_labelled"] * discriminator_loss(**logits), probabilities(**logits))

    def g_loss_c(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        painted = self.conditional(networks, batch)
        logits = networks["discriminator_c"](painted.image, batch["text"].sentence)
        kl = self.network.conditional.augmentation.kl(painted.augmented)
        loss = generator_loss(logits, kl, self.config.loss.kl)
        return Loss(batch["any_labelled"] * loss, {"adversarial": bce(logits, 1).detach(), "kl": kl.detach()})

    def joint_g_loss(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        total = self.g_loss_u(networks, batch, step).total
        return Loss(total if not self.config.labelled else total + self.g_loss_c(networks, batch, step).total)

    def r1_loss_u(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        judge = networks.penalty("discriminator_u")
        return self.r1_of(lambda image: [judge(image)], batch["unpaired"])

    def r1_loss_c(self, networks: Networks, batch: FusedGANBatch, step: int) -> Loss:
        judge = networks.penalty("discriminator_c")
        penalty = self.r1_of(lambda image: [judge(image, batch["text"].sentence)], batch["image"])
        return Loss(batch["any_labelled"] * penalty.total, penalty.parts)


def probabilities(**logits: Tensor) -> dict[str, Tensor]:
    """For the log: the mean probability of being real that each kind of picture is given."""
    return {name: values.detach().sigmoid().mean() for name, values in logits.items()}


def is_labelled(key: str, share: float, seed: int) -> bool:
    """Whether the sample ``key`` is one of the ``share`` whose captions are known: the same in every epoch."""
    digest = hashlib.blake2b(f"{seed},{key}".encode(), digest_size=8, person=b"labelled").digest()
    return int.from_bytes(digest, "big") < share * 2 ** 64


def unpaired_pool(data: DataConfig, shards: str, seed: int) -> ShardDataset:
    """The pictures of ``shards`` as those of the run are made, in an order of their own."""
    config = data.model_copy(update={"train": shards, "caption": "none", "num_captions": 1, "tokenizer": None})
    return ShardDataset(config, ShardIndex.load(shards, data.bad_shards), seed=seed + 1, training=True)
