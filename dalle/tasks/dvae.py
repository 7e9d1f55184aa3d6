"""Training the discrete VAE: the bound of arXiv 2102.12092, section 2.1, with the whole loss on one screen.

Per picture, over its C*H*W values and h*w code positions:

    loss = (NLL(picture | codes) + beta * sum over positions KL(q(code | picture) || uniform)) / (C*H*W)

Two terms of ours can be added: a reward for using the codebook evenly, without which a short run of the categorical
relaxation settles on a few dozen codes, and the edge distance, without which thin lines smear.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dalle.config import FREE, Section
from dalle.data.loader import train_batches, validation_batches
from dalle.models.dvae import PIXEL_MARGIN, DiscreteVAE, DVAEConfig, DVAEOutput, map_pixels
from dalle.models.perceptual import edge_distance
from dalle.models.quantizers import FSQConfig
from dalle.pictures import side_by_side, to_bytes, to_unit
from dalle.training.figures import Counts, Figure, Max, Mean, Perplexity, Used
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.schedules import cosine
from dalle.training.task import Batch, Loss, Networks, Phase, Player, Task

log = logging.getLogger(__name__)

PREVIEW_PICTURES = 8
USAGE_WINDOW = 1_000_000      # codes over which usage and perplexity are taken
COLLAPSED_USAGE = 0.15        # a share of codes in use below this is a collapse; 45 % and more is what good runs show
CODES_TO_JUDGE_USAGE = 10     # times the number of codes, before a low share means anything


class CosineRamp(Section, json_schema_extra=FREE):
    """From ``start`` to ``end`` along half a cosine, over a share of the run's updates; constant after that."""

    start: float = Field(ge=0, description="value at the first update")
    end: float = Field(ge=0, description="value from the end of the ramp on")
    over: float = Field(1.0, gt=0, le=1, description="share of the run's updates")
    at_least: int = Field(1, ge=1, description="updates, where the share comes to fewer")

    def at(self, step: int, total_steps: int) -> float:
        return cosine(step, self.start, self.end, max(self.at_least, round(self.over * total_steps)))


class DVAELossConfig(Section, json_schema_extra=FREE):
    """The defaults are the paper's: of 3,000,000 updates, beta takes 5,000 and the temperature 150,000."""

    beta: CosineRamp = Field(CosineRamp(start=0.0, end=6.6, over=1 / 600, at_least=500),
                             description="weight of the KL divergence from the uniform prior over codes")
    temperature: CosineRamp = Field(CosineRamp(start=1.0, end=1 / 16, over=0.05),
                                    description="of the Gumbel-softmax: what noisy logits are divided by")
    even_usage: float = Field(0.0, ge=0, description="weight of ln K - H(mean of q), per position, beside beta's")
    edges: float = Field(0.0, ge=0, description="weight of the edge distance, per value, on [-1, 1]")
    log_scale_floor: float | None = Field(-7.0, ge=-80, le=80, description="bound on ln b: a collapsed b has unbounded "
                                          "likelihood")

    @model_validator(mode="after")
    def _something_is_warm(self) -> "DVAELossConfig":
        if min(self.temperature.start, self.temperature.end) == 0:
            raise ValueError("temperature is what logits are divided by: from start to end it has to be above 0")
        return self


class DVAERun(RunConfig):
    """A dVAE run: the network, how it moves and what it is asked."""

    task: Literal["dvae"] = Field("dvae", description="what is trained: a discrete VAE")
    model: DVAEConfig = Field(description="the codec: its networks and its codes")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how its weights move")
    loss: DVAELossConfig = Field(DVAELossConfig(), description="what it is asked")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "DVAERun":
        if self.model.image_size != self.data.image_size:
            raise ValueError(f"model.image_size {self.model.image_size} is not data.image_size {self.data.image_size}")
        if not self.data.images:
            raise ValueError("the dVAE looks at pictures: set data.images to true")
        if isinstance(self.model.quantizer, FSQConfig) and self.loss.even_usage > 0:
            raise ValueError("loss.even_usage needs a categorical: FSQ has none, set it to 0")
        return self


class DVAEBatch(Batch, total=False):
    """Pictures as the losses take them."""

    image: Tensor                   # float [b, 3, S, S] on [0, 1]
    temperature: Tensor             # 0-d fp32: the step's, and so with
    beta: Tensor


class DVAETask(Task):
    """One player, one phase."""

    def __init__(self, config: DVAERun):
        self.config = config
        model = DiscreteVAE(config.model)
        self.num_codes = model.num_codes
        self.players = {"dvae": Player(model, config.optimizer)}
        self.frozen = {}
        self.phases = [Phase("reconstruct", player="dvae", loss=self.reconstruct, capturable=True)]
        self.tokens_per_sample = math.prod(model.grid)
        self.flops_per_sample = model.training_flops()
        self.usage = CodeUsage(model.num_codes, USAGE_WINDOW)
        self.preview_images: Tensor | None = None

    def prepare(self, batch: Batch, networks: Networks, step: int) -> DVAEBatch:
        """Pictures to float on [0, 1], and what the loss takes from the step."""
        images = to_unit(batch["image"])
        self.usage.begin(len(images) * self.tokens_per_sample, images.device, step, networks.world_size)
        return {**batch, "image": images, **self.annealed(step, images.device)}

    def annealed(self, step: int, device: torch.device) -> DVAEBatch:
        """The step's ``temperature`` and ``beta``."""
        steps, ramps = self.config.train.steps, {"temperature": self.config.loss.temperature,
                                                 "beta": self.config.loss.beta}
        return {name: torch.full((), ramp.at(step, steps), device=device) for name, ramp in ramps.items()}

    def reconstruct(self, networks: Networks, batch: DVAEBatch, step: int) -> Loss:
        """The bound on one micro-batch, in nats per value of the picture, and the parts it is made of."""
        images, weights = batch["image"], self.config.loss
        values = images[0].numel()                                             # C*H*W; 196,608 in the paper
        output = DVAEOutput(*networks["dvae"](images, batch["temperature"]))
        self.usage.count(output.codes)

        if output.log_scale is None:
            nll = squared_error(output.mean, images)
        else:
            nll = logit_laplace_nll(output.mean, output.log_scale, images, weights.log_scale_floor)
        total = nll.mean() / values
        parts = {"nll_per_value": total.detach()}

        if output.code_logits is not None:
            log_q = output.code_logits.movedim(1, -1).log_softmax(dim=-1)      # [B, h, w, K]: no noise, no temperature
            kl = kl_to_uniform(log_q)
            total = total + batch["beta"] * kl.mean() / values
            parts["kl_per_position"] = kl.detach().mean() / output.codes.shape[1]
            parts["max_logit"] = Max(output.code_logits.detach().abs().max())
            if weights.even_usage > 0:
                unevenness = uneven_usage(log_q)
                total = total + weights.even_usage * output.codes.shape[1] * unevenness / values
                parts["uneven_usage"] = unevenness.detach()
        if weights.edges > 0:
            edges = edge_distance(2 * self._pixels(output), 2 * images).mean()
            total = total + weights.edges * edges
            parts["edges"] = edges.detach()
        if output.log_scale is not None:
            parts["mean_log_scale"] = output.log_scale.detach().mean()
        return Loss(total, parts)

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """The same few pictures over their reconstructions from hard codes."""
        model = networks.bare("dvae")
        if self.preview_images is None:
            self.preview_images = self._first_pictures()
        images = self.preview_images.to(next(model.parameters()).device)
        rebuilt = model.decode(model.encode(to_unit(images)))
        return {"reconstruction": torch.cat([side_by_side(images), side_by_side(to_bytes(rebuilt))], dim=1)}

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Figure]:
        """PSNR in dB through hard codes, what the relaxation still gains over them, and how many codes are in use."""
        model = networks.bare("dvae")
        psnr, gap = Mean(), Mean()
        usage = CodeUsage(self.num_codes, window=None)
        for batch in batches:
            images = to_unit(batch["image"])
            codes = model.encode(images)
            usage.add(codes)
            hard = peak_signal_to_noise(model.decode(codes), images)
            psnr.add(hard.mean(), len(images))
            if self._relaxes:
                gap.add((self._relaxed_psnr(model, images) - hard).mean(), len(images))
        self._warn_of_collapse(usage)
        figures: dict[str, Figure] = {"psnr": psnr, **usage.figures()}
        return {**figures, "relaxed_gain_db": gap} if self._relaxes else figures

    def metrics(self, step: int) -> dict[str, Figure | Tensor | float]:
        """The annealed quantities, and the codebook's usage over the last million codes of all ranks."""
        figures: dict[str, Figure | Tensor | float] = {**self.usage.figures()}
        if self._relaxes:
            figures["beta"] = self.config.loss.beta.at(step, self.config.train.steps)
            figures["temperature"] = self.config.loss.temperature.at(step, self.config.train.steps)
        return figures

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json`` and ``model.safetensors``."""
        self.players["dvae"].module.save_pretrained(folder, states["dvae"])

    @property
    def _relaxes(self) -> bool:
        return not isinstance(self.config.model.quantizer, FSQConfig)

    def _pixels(self, output: DVAEOutput) -> Tensor:
        """The picture on [0, 1] that the decoder stands for, unclipped: a clip would stop the gradient outside."""
        if output.log_scale is None:
            return output.mean
        return (output.mean.sigmoid() - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)

    def _relaxed_psnr(self, model: DiscreteVAE, images: Tensor) -> Tensor:
        """PSNR [B] of the training path at the final temperature, with the same noise at every call."""
        noise = torch.Generator(images.device).manual_seed(self.config.seed)
        output = model(images, self.config.loss.temperature.end, noise)
        return peak_signal_to_noise(model.pixels(output.mean), images)

    def _warn_of_collapse(self, usage: "CodeUsage") -> None:
        used = usage.figures()["codes_used"].value
        if usage.seen >= CODES_TO_JUDGE_USAGE * self.num_codes and used < COLLAPSED_USAGE * self.num_codes:
            log.warning("only %d of %d codes are in use: the codebook has collapsed (see loss.even_usage)",
                        used, self.num_codes)

    def _first_pictures(self) -> Tensor:
        """uint8 [8, 3, S, S]: of the validation set where there is one."""
        data = self.config.data.model_copy(update={"workers": 0})
        if data.validation is None:
            batches = train_batches(data, seed=0, batch_size=PREVIEW_PICTURES)
        else:
            batches = validation_batches(data, seed=0, batch_size=PREVIEW_PICTURES, limit=PREVIEW_PICTURES)
        return next(iter(batches))["image"]


# --- the terms of the loss --------------------------------------------------------------------------------------------


def logit_laplace_nll(mean: Tensor, log_scale: Tensor, images: Tensor, floor: float | None = None) -> Tensor:
    """-ln f(x | mu, b) of the paper's eq. 2, summed over each picture: [B]. May be negative: f is a density.

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), at the mapped pixel x in [0.1, 0.9].
    """
    log_scale = log_scale if floor is None else log_scale.clamp_min(floor)
    x = map_pixels(images)
    log_density = -(2 * x * (1 - x)).log() - log_scale - (x.logit() - mean).abs() * (-log_scale).exp()
    return -log_density.sum(dim=(1, 2, 3))


def squared_error(mean: Tensor, images: Tensor) -> Tensor:
    """Squared error on [-1, 1], summed over each picture: [B]. A gaussian's NLL at variance 1/2, less its constant."""
    return (2 * mean - 2 * images).square().sum(dim=(1, 2, 3))


def kl_to_uniform(log_q: Tensor) -> Tensor:
    """KL(q || uniform) = sum_k q_k (ln q_k + ln K), summed over positions: ln q [B, h, w, K] -> [B].

    Between 0 and h*w*ln K.
    """
    return (log_q.exp() * (log_q + math.log(log_q.shape[-1]))).sum(dim=(1, 2, 3))


def uneven_usage(log_q: Tensor) -> Tensor:
    """ln K - H(p), p the mean of q [B, h, w, K] over all pictures and positions: 0 when the codebook is evenly used."""
    p = log_q.exp().mean(dim=(0, 1, 2))
    return (p * (p.clamp_min(1e-12).log() + math.log(log_q.shape[-1]))).sum()   # the clamp keeps the gradient finite


# --- what is measured -------------------------------------------------------------------------------------------------


class CodeUsage:
    """How often each code was chosen, over the last ``window`` to twice ``window`` codes of all ranks (``None``: all).

    Whole steps are kept or forgotten, so that ranks and micro-batches of any number count the same codes.
    """

    def __init__(self, num_codes: int, window: int | None):
        self.num_codes = num_codes
        self.window = window
        self.seen = 0                    # by this rank, in the newer window
        self._step = 0
        # of the newer window and of the one before, in the same memory throughout: what is recorded adds to it
        self._counts, self._counts_before = torch.zeros(2, num_codes, dtype=torch.int64)

    def add(self, codes: Tensor, step: int = 0, ranks: int = 1) -> None:
        """Count ``codes`` (any shape) of ``step``, of which all ``ranks`` have as many."""
        self.begin(codes.numel(), codes.device, step, ranks)
        self.count(codes)

    def begin(self, number: int, device: torch.device, step: int, ranks: int) -> None:
        """So many codes of ``step`` follow, on each of all ``ranks``."""
        if self._counts.device != device:
            self._counts, self._counts_before = self._counts.to(device), self._counts_before.to(device)
        if self.window is not None and self.seen * ranks >= self.window and step != self._step:
            self._counts_before.copy_(self._counts)
            self._counts.zero_()
            self.seen = 0
        self._step = step
        self.seen += number

    def count(self, codes: Tensor) -> None:
        """Add them; nothing leaves the device."""
        self._counts.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))

    def figures(self) -> dict[str, Counts]:
        """``codes_used`` and ``perplexity``, of this rank's codes until they are joined with the others'."""
        counts = (self._counts + self._counts_before).cpu()
        return {"codes_used": Used(counts), "perplexity": Perplexity(counts)}


def peak_signal_to_noise(images: Tensor, others: Tensor) -> Tensor:
    """PSNR in dB of each picture on [0, 1]: [B]. Equal pictures give 100, so that a mean stays finite."""
    return -10 * (images - others).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()
