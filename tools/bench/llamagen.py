#!/usr/bin/env python
"""Training and sampling speed of our transformer in LlamaGen's shape against LlamaGen's own, in turns in one process.

The peer is its repository at ce98ec4 (June 2024), of which `autoregressive` and `utils` are imported:

    git clone https://github.com/FoundationVision/LlamaGen PEER
    python tools/bench/llamagen.py --peer PEER --rounds 15 --cpu-time

Without ``--peer`` our side runs alone. Configuration (its t2i form): width 256, depth 8, 8 heads of 32, SwiGLU 768,
RMSNorm, rotary positions, no biases, 32 caption + 256 image tokens, 512 codes. Training: batch 8, dropout 0.1 of the
embeddings and of each half of a block, fused AdamW and clipping at 1 on both sides. Sampling: batch 16, half of the
codes kept.

What is not the same: the peer projects given caption features of 256 by two products and scores no text; ours embeds
ids and scores them, with a vocabulary that makes the parameters as many, 7.21 M. The peer gets no padding mask, with
which its attention would be slower. Its empty caption has 120 tokens whatever the caption's length, so that training
with 32 fails until the first 32 are put in its place, which is done here. The peer's step is that of its script: its
optimiser, ``loss.item()`` included; ours is the engine's, by ``train_step``.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.decode import SamplingConfig, sample_codes
from dalle.tasks.transformer import TransformerRun
from rounds import Clock, Contenders, Synthetic, bench_arguments, interleave, report, set_up, trained_by_the_loop

TRAIN_BATCH, SAMPLE_BATCH = 8, 16
DROPOUT, CLIP, RATE, BETAS, DECAY = 0.1, 1.0, 1e-4, (0.9, 0.95), 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """What both models have in common."""

    dim: int = 256
    depth: int = 8
    heads: int = 8
    text_length: int = 32
    side: int = 16
    num_codes: int = 512

    @property
    def num_image_slots(self) -> int:
        return self.side**2


TINY = Size(dim=32, depth=1, heads=2, text_length=4, side=4, num_codes=16)


def build_ours(size: Size, dropout: float = 0.0) -> TextToImageTransformer:
    return TextToImageTransformer(TransformerConfig(
        dim=size.dim, depth=size.depth, heads=size.heads, text_length=size.text_length,
        num_text_tokens=size.dim - size.text_length, grid=(size.side, size.side), num_codes=size.num_codes,
        attention="full", norm="rmsnorm", mlp="swiglu", mlp_ratio=3, positions="rotary", bias=False, dropout=dropout))


def our_step(size: Size, precision: str) -> Callable[[], None]:
    config = TransformerRun.model_validate({
        "name": "llamagen", "codec": "none",
        "data": {"train": "memory", "tokenizer": "none", "text_length": size.text_length},
        "optimizer": {"lr": RATE, "betas": BETAS, "weight_decay": DECAY, "clip": CLIP, "schedule": "constant"},
        "train": {"steps": 1_000_000, "batch_size": TRAIN_BATCH, "precision": precision}})
    model = build_ours(size, DROPOUT)
    batch = {"text": torch.randint(1, model.config.num_text_tokens, (TRAIN_BATCH, size.text_length)),
             "codes": torch.randint(0, size.num_codes, (TRAIN_BATCH, size.num_image_slots))}
    print(f"  parameters: ours {model.num_parameters:,}")
    return trained_by_the_loop(Synthetic(config, model), config, batch)


def our_sampler(size: Size, precision: str) -> Callable[[], None]:
    model = build_ours(size).to(DTYPES[precision]).eval()
    text = torch.randint(1, model.config.num_text_tokens, (SAMPLE_BATCH, size.text_length))
    options = SamplingConfig(top_k=size.num_codes // 2)
    return lambda: sample_codes(model, text, list(range(SAMPLE_BATCH)), options)


class Peer:
    """LlamaGen's models and what its scripts do with them."""

    def __init__(self, folder: Path, size: Size):
        sys.path.insert(0, str(folder))
        try:
            from autoregressive.models import generate, gpt
        except ImportError as error:
            sys.exit(f"--peer {folder}: {error}; it is a clone of LlamaGen, with `autoregressive` and `utils`")
        self.gpt: types.ModuleType = gpt
        self.generate: types.ModuleType = generate
        self.size = size

    def build(self) -> torch.nn.Module:
        size = self.size
        model = self.gpt.Transformer(self.gpt.ModelArgs(
            dim=size.dim, n_layer=size.depth, n_head=size.heads, multiple_of=min(256, size.dim), caption_dim=size.dim,
            vocab_size=size.num_codes, cls_token_num=size.text_length, block_size=size.num_image_slots,
            token_dropout_p=DROPOUT, resid_dropout_p=DROPOUT, ffn_dropout_p=DROPOUT, model_type="t2i"))
        captions = model.cls_embedding
        captions.uncond_embedding = captions.uncond_embedding.detach()[:size.text_length].clone()
        return model

    def step(self, precision: str) -> Callable[[], None]:
        size, model = self.size, self.build().train()
        captions = torch.randn(TRAIN_BATCH, size.text_length, size.dim)
        codes = torch.randint(0, size.num_codes, (TRAIN_BATCH, size.num_image_slots))
        print(f"  parameters: peer {sum(parameter.numel() for parameter in model.parameters()):,}")
        groups = [{"params": [one for one in model.parameters() if one.dim() >= 2], "weight_decay": DECAY},
                  {"params": [one for one in model.parameters() if one.dim() < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                _, loss = model(cond_idx=captions, idx=codes[:, :-1], targets=codes)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

        return step

    def sampler(self, precision: str) -> Callable[[], None]:
        size, dtype = self.size, DTYPES[precision]
        model = self.build().to(dtype).eval()
        captions = torch.randn(SAMPLE_BATCH, size.text_length, size.dim, dtype=dtype)
        return lambda: self.generate.generate(model, captions, size.num_image_slots, top_k=size.num_codes // 2)


def bench(part: str, peer: Peer | None, size: Size, precisions: list[str], rounds: int, clock: Clock) -> None:
    print(part)
    training = part == "training"
    contenders: Contenders = {}
    for precision in precisions:
        if peer is not None:
            contenders[f"peer {precision}"] = (peer.step if training else peer.sampler)(precision)
        contenders[f"ours {precision}"] = (our_step if training else our_sampler)(size, precision)
    work, unit = (TRAIN_BATCH * (size.text_length + size.num_image_slots), "tokens/s") if training \
        else (SAMPLE_BATCH, "images/s")
    report(interleave(contenders, rounds, clock), work, unit,
           [("peer fp32", "ours fp32"), ("peer bf16", "ours bf16"), ("peer fp32", "ours bf16")])


def main(arguments: list[str] | None = None) -> None:
    parser = bench_arguments(__doc__, rounds=15)
    parser.add_argument("--peer", type=Path, help="a clone of LlamaGen; without it ours runs alone")
    parser.add_argument("--part", choices=["training", "sampling", "all"], default="all")
    parser.add_argument("--tiny", action="store_true", help="models of no use, to see that this script works")
    options = parser.parse_args(arguments)
    clock, size = set_up(options), TINY if options.tiny else Size()
    peer = Peer(options.peer, size) if options.peer else None
    for part in ("training", "sampling"):
        if options.part in (part, "all"):
            bench(part, peer, size, options.precisions, options.rounds, clock)


if __name__ == "__main__":
    main()
