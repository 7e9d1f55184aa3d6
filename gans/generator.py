"""What paints captions with a trained GAN: to ``launch/sample.py`` and ``launch/evaluate.py`` as a transformer is.

A picture follows from its seed, its caption and the weights alone: the noise is drawn from the seed, the network is in
evaluation mode, and batches are always filled to one size, because another size may round differently.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.models.base import CONFIG_FILE, PretrainedModel
from dalle.pictures import fit_picture, signed_to_bytes, to_bytes, to_signed
from dalle.store import OnProgress, identify, load_model, model_kind
from gans import NETWORKS, looking
from gans.text import Text, load_text_encoder

TEXT_FOLDER = "text"       # of an exported generator
PAINT_BATCH = 32

Noise = dict[str, Tensor]


class Painter(PretrainedModel):
    """A generator network: the base of every system's.

    ``noise_dims`` names the noises that it takes and their lengths. ``forward`` is the system's own, for its losses.
    """

    edits: ClassVar[bool] = False                                  # whether it changes a picture, ``source``
    noise_law: ClassVar[Literal["normal", "uniform"]] = "normal"   # N(0, 1), or uniform in -1..1

    @property
    def noise_dims(self) -> dict[str, int]:
        """Name -> length of each noise vector of a picture."""
        raise NotImplementedError

    def paint(self, noise: Noise, text: Text | None, **conditions: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Float [B, 3, S, S] in [-1, 1], and what else there is to see, by name, [B, ...] each.

        ``conditions``: what :meth:`conditions` gave and, for a network that edits, ``source`` [B, 3, S, S] in [-1, 1].
        """
        raise NotImplementedError

    def options(self, **given: Any) -> dict[str, Any]:
        """The network's own options of a call, checked and with those that were left out; ``UserError`` for others.

        A command gives a value as the text that was typed, a program as it is.
        """
        if given:
            name = next(iter(given)).replace("_", "-")
            raise UserError(f"--{name} is not an option of a {self.model_type} model, which draws no codes; its "
                            "candidates differ by their noise alone")
        return {}

    def conditions(self, captions: Sequence[str], text: Text | None, **options: Any) -> dict[str, Any]:
        """What :meth:`paint` needs beside the text, from the captions themselves and what :meth:`options` gave."""
        return {}

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """A line for every caption that a network without a text encoder cannot read whole."""
        return ["this model reads no captions: a prompt only names its pictures, the seed says what is painted"]

    def pictures(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        """uint8 [3, h, w] each, by name: what else :meth:`paint` gave of one picture as something to look at.

        Here what :func:`gans.looking.seen` names: the scales side by side, and where each word was looked for.
        """
        return looking.pictures(values)


class GANGenerator:
    """A generator network and its text encoder (None for one that reads no text).

    Options of every call: ``batch_size``, the pictures painted side by side, and ``truncation``, by which a noise that
    is drawn is multiplied (below 1: safer and less varied); and those of the network, :meth:`Painter.options`.

    What a picture is made of can also be given: ``noise``, name -> [N, length], in the place of what the seeds draw
    under these names, and ``text`` of N captions in the place of what the encoder reads. :meth:`noise` and :meth:`text`
    say what would have been there, so that one can be kept while another changes.
    """

    precision: ClassVar[str] = "fp32"      # whatever type was asked for
    completes: ClassVar[bool] = False

    def __init__(self, network: Painter, text_encoder: nn.Module | None, identity: dict[str, Any] | None = None):
        self.network, self.text_encoder = network.eval(), text_encoder
        self.identity = identity or {"kind": network.model_type}
        self.image_size: int = network.config.image_size
        self.edits: bool = network.edits

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """A line for every caption that the text encoder cannot read whole."""
        if self.text_encoder is None:
            return self.network.caption_warnings(captions)
        return self.text_encoder.warnings(captions)

    def settings(self, **options: Any) -> dict[str, Any]:
        """``truncation`` and the network's own, checked; every other option is refused."""
        truncation = options.pop("truncation", 1.0)
        own = self.network.options(**options)
        if not isinstance(truncation, (int, float)) or not 0 <= truncation <= 1:
            raise UserError(f"truncation is {truncation!r}; it is a number from 0 to 1")
        return {"truncation": float(truncation), **own}

    def noise(self, seeds: Sequence[int], truncation: float = 1.0) -> Noise:
        """Name -> float [N, length], on the CPU: what ``generate`` draws of these seeds."""
        drawn = noise_of_seeds(seeds, self.network.noise_dims, self.network.noise_law)
        return {name: truncation * values for name, values in drawn.items()}

    def text(self, captions: Sequence[str]) -> Text:
        """What ``generate`` reads of these captions; ``UserError`` for a network that reads none."""
        if self.text_encoder is None:
            raise UserError(f"this {self.network.model_type} model reads no captions")
        return self.text_encoder(captions)

    def generate(self, captions: list[str], seeds: list[int], **options: Any) -> Tensor:
        """One picture for each (caption, seed): uint8 [N, 3, S, S]."""
        return self._generate(captions, seeds, detailed=False, **options)[0]

    def generate_with_details(self, captions: list[str], seeds: list[int],
                              **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        """The pictures, and for each a dict with ``pictures``: name -> uint8 [3, h, w], where there is more to see.

        The option ``sources`` uint8 [N, 3, H, W] is what a network that edits changes.
        """
        return self._generate(captions, seeds, detailed=True, **options)

    @torch.no_grad()
    def _generate(self, captions: list[str], seeds: list[int], *, detailed: bool, sources: Tensor | None = None,
                  noise: Mapping[str, Tensor] | None = None, text: Text | None = None, batch_size: int | None = None,
                  on_progress: OnProgress = lambda pictures: None,
                  **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions but {len(seeds)} seeds: one seed a picture is needed")
        if self.edits != (sources is not None):
            raise UserError(f"a {self.network.model_type} model edits a picture: give one with --image" if self.edits
                            else f"a {self.network.model_type} model paints from nothing: leave --image out")
        self._check_given(len(seeds), noise or {}, text)
        settings = self.settings(**options)
        size = batch_size or PAINT_BATCH
        was_training = self.network.training
        self.network.eval()
        images = torch.empty(len(seeds), 3, self.image_size, self.image_size, dtype=torch.uint8)
        details: list[dict[str, Any]] = []
        for start in range(0, len(seeds), size):
            part = list(range(start, min(start + size, len(seeds))))
            filled = part + part[-1:] * (size - len(part))
            painted, extra = self._paint([captions[index] for index in filled], [seeds[index] for index in filled],
                                         None if sources is None else sources[filled],
                                         {name: values[filled] for name, values in (noise or {}).items()},
                                         None if text is None else Text(*(values[filled] for values in text)),
                                         **settings)
            images[part] = signed_to_bytes(painted)[:len(part)].cpu()
            if detailed:
                details += [self._details({name: values[row] for name, values in extra.items()}, captions[index])
                            for row, index in enumerate(part)]
            on_progress(part[-1] + 1)
        self.network.train(was_training)
        return images, details

    def _check_given(self, count: int, noise: Mapping[str, Tensor], text: Text | None) -> None:
        dims = self.network.noise_dims
        for name, values in noise.items():
            if name not in dims:
                raise ValueError(f"unknown noise {name!r}; a {self.network.model_type} model draws {', '.join(dims)}")
            if tuple(values.shape) != (count, dims[name]):
                raise ValueError(f"noise {name} is {list(values.shape)}, not {[count, dims[name]]}")
        if text is not None and len(text.sentence) != count:
            raise ValueError(f"text of {len(text.sentence)} captions for {count} pictures")

    def _paint(self, captions: list[str], seeds: list[int], sources: Tensor | None, noise: Noise, text: Text | None,
               truncation: float, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.network.parameters()).device
        if text is not None:
            text = text.to(device)
        elif self.text_encoder is not None:
            text = self.text_encoder(captions)
        conditions = self.network.conditions(captions, text, **options)
        if sources is not None:
            conditions["source"] = fitted(sources, self.image_size).to(device)
        noise = {name: values.to(device) for name, values in (self.noise(seeds, truncation) | noise).items()}
        return self.network.paint(noise, text, **conditions)

    def _details(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Any]:
        """What the network shows of one picture."""
        shown = self.network.pictures(values, caption) if values else {}
        return {"pictures": shown} if shown else {}


def noise_of_seeds(seeds: Sequence[int], dims: Mapping[str, int], law: str) -> Noise:
    """Name -> float [N, length]; row i from seed i alone."""
    rows = [draw_noise(torch.Generator().manual_seed(seed), 1, dims, law) for seed in seeds]
    return {name: torch.cat([row[name] for row in rows]) for name in dims}


def draw_noise(source: torch.Generator, count: int, dims: Mapping[str, int], law: str) -> Noise:
    """Name -> float [count, length], in the order of the names."""
    draw = {"normal": lambda length: torch.randn(count, length, generator=source),
            "uniform": lambda length: 2 * torch.rand(count, length, generator=source) - 1}[law]
    return {name: draw(length) for name, length in dims.items()}


def fitted(images: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, H, W] -> float [N, 3, size, size] in [-1, 1]: the centred square, resized."""
    return to_signed(to_bytes(torch.stack([fit_picture(image, size) for image in images])))


def load_gan(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> GANGenerator:
    """The generator in an exported folder, with the text encoder that lies in its ``text/``. Always in fp32."""
    network = load_model(NETWORKS[model_kind(folder)], folder, device)
    text = folder / TEXT_FOLDER
    encoder = load_text_encoder(str(text), device) if (text / CONFIG_FILE).is_file() else None
    return GANGenerator(network, encoder, identify(folder))
