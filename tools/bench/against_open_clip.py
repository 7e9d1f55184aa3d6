#!/usr/bin/env python
"""Speed of training a CLIP against open_clip's own step, interleaved in one process.

    python tools/bench/against_open_clip.py --rounds 15 --cpu-time

The peer is the open_clip that the project has as a library (3.3.0): its model from a config of the same sizes, and the
step of its training script: zero_grad, autocast, forward, ``ClipLoss``, backward, AdamW, clamp of the scale. Its script
clips no gradients by default, and its AdamW is not the fused one; here the peer has the fused one, as ours, so that the
ratio is not the optimiser's (``--plain-adamw``: as its script builds it). Ours is the task, the engine and
``train_step``: it takes raw bytes and caption ids, clips at 1 and checks that losses and gradients are finite. (This
file is not named as the peer is, for it would be imported in its place.)

Configuration: 64x64 pictures in patches of 8, two towers of 6 x 256 with heads of 64, features of 256, context 32,
vocabulary 10,000 (12.24 M parameters), batch 64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch

from dalle.models.clip import MAX_LOG_SCALE, ClipConfig, ClipModel
from dalle.tasks.clip import ClipRun, ClipTask
from rounds import Clock, Contenders, bench_arguments, interleave, report, set_up, trained_by_the_loop

RATE, BETAS, EPS, DECAY, CLIP = 5e-4, (0.9, 0.98), 1e-6, 0.2, 1.0      # of open_clip's script for its ViTs, but CLIP
MARKS = 2                                                              # start and end, which our towers add


@dataclass(frozen=True)
class Size:
    """What both models have in common."""

    width: int = 256
    layers: int = 6
    head_width: int = 64
    side: int = 64
    patch: int = 8
    context: int = 32
    vocabulary: int = 10_000
    batch: int = 64

    @property
    def vision(self) -> dict:
        return {"layers": self.layers, "width": self.width, "head_width": self.head_width, "patch_size": self.patch,
                "image_size": self.side}

    @property
    def text(self) -> dict:
        return {"layers": self.layers, "width": self.width, "heads": self.width // self.head_width}


TINY = Size(width=16, layers=1, head_width=8, side=16, context=8, vocabulary=64, batch=4)


class Synthetic(ClipTask):
    """The task without a tokenizer and a codec: captions come as ids."""

    def __init__(self, config: ClipRun, model: ClipModel):
        self.frozen = {}
        self.assemble(config, model)


def our_step(size: Size, precision: str) -> Callable[[], None]:
    config = ClipRun.model_validate({
        "name": "clip", "data": {"train": "memory", "tokenizer": "none", "text_length": size.context - MARKS,
                                 "image_size": size.side},
        "model": {"vision": size.vision, "text": size.text, "embed_dim": size.width},
        "optimizer": {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "clip": CLIP,
                      "schedule": "constant"},
        "train": {"steps": 1_000_000, "batch_size": size.batch, "precision": precision}})
    model = ClipModel(ClipConfig(**config.model.model_dump(), text_length=config.data.text_length,
                                 num_text_tokens=size.vocabulary - MARKS))
    batch = {"image": torch.randint(0, 256, (size.batch, 3, size.side, size.side), dtype=torch.uint8),
             "text": torch.randint(1, size.vocabulary - MARKS, (size.batch, config.data.text_length))}
    print(f"  parameters: ours {model.num_parameters:,}")
    return trained_by_the_loop(Synthetic(config, model), config, batch)


def peer_step(size: Size, precision: str, fused: bool) -> Callable[[], None]:
    text_tower = {**size.text, "context_length": size.context, "vocab_size": size.vocabulary}
    model = open_clip.CLIP(size.width, size.vision, text_tower, output_dict=True).train()
    print(f"  parameters: peer {sum(parameter.numel() for parameter in model.parameters()):,}")
    undecayed = {name for name, parameter in model.named_parameters()
                 if parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))}
    groups = [{"params": [one for name, one in model.named_parameters() if name in undecayed], "weight_decay": 0.0},
              {"params": [one for name, one in model.named_parameters() if name not in undecayed],
               "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=fused or None)
    loss_of = open_clip.ClipLoss()
    images = torch.randn(size.batch, 3, size.side, size.side)          # as its loader gives them: floats, normalised
    text = torch.randint(1, size.vocabulary - 1, (size.batch, size.context))
    text[:, -1] = size.vocabulary - 1                                  # the end, whose id is the highest

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = loss_of(**model(images, text), output_dict=True)
            total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)

    return step


def bench(size: Size, precisions: list[str], rounds: int, clock: Clock, fused: bool) -> None:
    print("training")
    contenders: Contenders = {}
    for precision in precisions:
        contenders[f"peer {precision}"] = peer_step(size, precision, fused)
        contenders[f"ours {precision}"] = our_step(size, precision)
    report(interleave(contenders, rounds, clock), size.batch, "images/s",
           [("peer fp32", "ours fp32"), ("peer bf16", "ours bf16"), ("peer fp32", "ours bf16")])


def main(arguments: list[str] | None = None) -> None:
    parser = bench_arguments(__doc__, rounds=15)
    parser.add_argument("--plain-adamw", action="store_true", help="the peer's optimiser as its script builds it")
    parser.add_argument("--tiny", action="store_true", help="models of no use, to see that this script works")
    options = parser.parse_args(arguments)
    clock = set_up(options)
    bench(TINY if options.tiny else Size(), options.precisions, options.rounds, clock, fused=not options.plain_adamw)


if __name__ == "__main__":
    main()
