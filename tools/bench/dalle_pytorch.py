#!/usr/bin/env python
"""Speed of training, sampling and the codec against lucidrains' dalle-pytorch 1.6.6, interleaved in one process.

The peer is installed apart, so that the project's environment stays as it is:

    pip install --target PEER --no-deps dalle-pytorch==1.6.6 axial_positional_embedding rotary-embedding-torch einops
    python tools/bench/dalle_pytorch.py --peer PEER --threads 2

It cannot be imported as it is (its taming-transformers and youtokentome no longer install), so empty stand-ins for
modules that the measured code never calls are put in their place. Contenders take turns in shuffled rounds; a ratio is
the median over rounds of peer time / our time, so that a busy neighbour slows both sides of it. Without ``--peer`` our
side runs alone.

Configuration: width 256, depth 8, 8 heads of 32, 32 text + 256 image tokens, text vocabulary 10,000, 512 codes, token
shift, rotary positions, GEGLU x4; training batch 8 with Adam (peer) or fused AdamW (ours), clipping at 0.5; sampling
batch 16 with full attention. Codes are given: no codec is in the measured step.

The codec's row is one step of training, 64x64 pictures to 8x8 codes, batch 32: the peer's DiscreteVAE (3 layers, hidden
64, a Gumbel-softmax over 512 codes) with Adam, ours the quickstart's preset ``shapes`` by the task and the engine. They
are two networks for one purpose: ours works at a quarter of the side and below, and rounds (FSQ) to 1,024 codes.
"""

import importlib.machinery
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.decode import SamplingConfig, sample_codes
from dalle.tasks.dvae import DVAERun, DVAETask
from rounds import Clock, Contenders, bench_arguments, interleave, report, set_up, trained_by_the_loop

TRAIN_BATCH, SAMPLE_BATCH, CODEC_BATCH = 8, 16, 32
CLIP, RATE = 0.5, 3e-4
PICTURE = 64                 # pixels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """What both transformers have in common."""

    dim: int = 256
    depth: int = 8
    heads: int = 8
    text_length: int = 32
    side: int = 16
    num_words: int = 10_000
    num_codes: int = 512
    codec: str = "shapes"

    @property
    def slots(self) -> int:
        return self.side**2


TINY = Size(dim=32, depth=1, heads=2, text_length=4, side=4, num_words=50, num_codes=16, codec="tiny")
PATTERNS = {  # ours: the peer's
    "full": (("full",), ("full",)),
    "sparse": (("row", "column", "conv"), ("axial_row", "axial_col", "conv_like")),
}
PAIRS = [("peer fp32", "ours bf16"), ("peer fp32", "ours fp32"), ("peer bf16", "ours bf16")]
STAND_INS = {
    "taming": (), "taming.models": (), "taming.models.vqgan": ("VQModel", "GumbelVQ"), "omegaconf": ("OmegaConf",),
    "youtokentome": (), "pkg_resources": ("get_distribution",), "dall_e": (), "ftfy": (),
}


def import_peer(folder: Path) -> types.ModuleType:
    """dalle_pytorch from ``folder``, with stand-ins for what cannot be imported and is not used here."""
    sys.path.insert(0, str(folder))    # before this script's folder, whose file has the peer's name
    for name, attributes in STAND_INS.items():
        if name in sys.modules:
            continue
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for attribute in attributes:
            setattr(module, attribute, lambda *_: types.SimpleNamespace(version="1.6.6"))
        sys.modules[name] = module
    import dalle_pytorch.dalle_pytorch as peer

    return peer


def build_peer(peer: types.ModuleType, size: Size, pattern: str) -> torch.nn.Module:
    codec = peer.DiscreteVAE(image_size=4 * size.side, num_layers=2, num_tokens=size.num_codes, codebook_dim=64,
                             hidden_dim=16)
    return peer.DALLE(dim=size.dim, vae=codec, num_text_tokens=size.num_words, text_seq_len=size.text_length,
                      depth=size.depth, heads=size.heads, dim_head=size.dim // size.heads,
                      attn_types=PATTERNS[pattern][1], shift_tokens=True, rotary_emb=True)


def build_ours(size: Size, pattern: str) -> TextToImageTransformer:
    return TextToImageTransformer(TransformerConfig(
        dim=size.dim, depth=size.depth, heads=size.heads, text_length=size.text_length, num_text_tokens=size.num_words,
        grid=(size.side, size.side), num_codes=size.num_codes, attention=PATTERNS[pattern][0], conv_kernel=5,
        positions="rotary", mlp="geglu", token_shift=True))


def random_batch(size: Size, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randint(1, size.num_words, (batch, size.text_length)),
            torch.randint(0, size.num_codes, (batch, size.slots)))


def training_step(loss: Callable[[], torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                  bfloat16: bool) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(size: Size, pattern: str, precision: str) -> Callable[[], None]:
    model = build_ours(size, pattern)
    text, codes = random_batch(size, TRAIN_BATCH)
    print(f"  parameters: ours {model.num_parameters:,}")

    def loss() -> torch.Tensor:
        text_sum, image_sum = model(text, codes, model.text_targets(text))
        return (text_sum / text.numel() + 7 * image_sum / codes.numel()) / 8

    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    return training_step(loss, model, adamw, precision == "bf16")


def peer_step(peer: types.ModuleType, size: Size, pattern: str, precision: str) -> Callable[[], None]:
    model = build_peer(peer, size, pattern)
    text, codes = random_batch(size, TRAIN_BATCH)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"  parameters: peer {sum(parameter.numel() for parameter in learning):,}")
    return training_step(lambda: model(text.clone(), codes, return_loss=True), model,
                         torch.optim.Adam(learning, lr=RATE), precision == "bf16")


def peer_sampler(peer: types.ModuleType, size: Size, repaired: bool, codes: int) -> Callable[[], None]:
    """The peer's ``generate_images`` with use_cache=True, writing the last ``codes`` of its image tokens.

    As shipped, ``forward_with_cond_scale`` drops the cache it is given, so every token recomputes its whole prefix.
    ``repaired`` passes the cache on. Fewer codes than all start from known ones, which cost the peer one full pass.
    """
    model = build_peer(peer, size, "full").eval()
    if repaired:
        model.forward_with_cond_scale = lambda *inputs, cond_scale=1, cache=None: model(*inputs, cache=cache)
    text, _ = random_batch(size, SAMPLE_BATCH)
    model.vae.decode = lambda sequence: sequence          # no codec in the figure
    known = size.slots - codes
    model.vae.get_codebook_indices = lambda images: torch.zeros(len(images), size.slots, dtype=torch.long)
    image = torch.zeros(SAMPLE_BATCH, 3, 4 * size.side, 4 * size.side) if known else None
    return lambda: model.generate_images(text.clone(), use_cache=True, img=image, num_init_img_tokens=known or None)


def our_sampler(size: Size, precision: str) -> Callable[[], None]:
    """Ours on the same work: 16 different captions, half of the vocabulary kept."""
    model = build_ours(size, "full").to(DTYPES[precision]).eval()
    text, _ = random_batch(size, SAMPLE_BATCH)
    options = SamplingConfig(top_k=size.num_codes // 2)
    return lambda: sample_codes(model, text, list(range(SAMPLE_BATCH)), options)


def our_codec_step(size: Size, precision: str) -> Callable[[], None]:
    side = 16 if size.codec == "tiny" else PICTURE
    config = DVAERun.model_validate({
        "name": "codec", "data": {"train": "memory", "image_size": side}, "model": {"preset": size.codec},
        "optimizer": {"lr": RATE, "clip": 1.0, "schedule": "constant"}, "loss": {"beta": {"start": 0.0, "end": 0.0}},
        "train": {"steps": 1_000_000, "batch_size": CODEC_BATCH, "precision": precision}})
    task = DVAETask(config)
    print(f"  parameters: ours {task.players['dvae'].module.num_parameters:,}")
    images = torch.randint(0, 256, (CODEC_BATCH, 3, side, side), dtype=torch.uint8)
    return trained_by_the_loop(task, config, {"image": images})


def peer_codec_step(peer: types.ModuleType, precision: str) -> Callable[[], None]:
    model = peer.DiscreteVAE(image_size=PICTURE, num_layers=3, num_tokens=512, codebook_dim=512, hidden_dim=64)
    print(f"  parameters: peer {sum(parameter.numel() for parameter in model.parameters()):,}")
    images = torch.rand(CODEC_BATCH, 3, PICTURE, PICTURE)
    return training_step(lambda: model(images, return_loss=True), model, torch.optim.Adam(model.parameters(), lr=RATE),
                         precision == "bf16")


def bench_training(peer: types.ModuleType | None, size: Size, precisions: list[str], rounds: int, clock: Clock) -> None:
    for pattern in PATTERNS:
        print(f"training, {pattern}")
        contenders: Contenders = {}
        for precision in precisions:
            if peer is not None:
                contenders[f"peer {precision}"] = peer_step(peer, size, pattern, precision)
            contenders[f"ours {precision}"] = our_step(size, pattern, precision)
        report(interleave(contenders, rounds, clock), TRAIN_BATCH * (size.text_length + size.slots), "tokens/s", PAIRS)


def bench_sampling(peer: types.ModuleType | None, size: Size, precisions: list[str], rounds: int, clock: Clock,
                   shipped_codes: int) -> None:
    print("sampling, full attention")
    contenders = {f"ours {precision}": our_sampler(size, precision) for precision in precisions}
    if peer is not None:
        contenders = {"peer repaired": peer_sampler(peer, size, True, size.slots), **contenders}
    times = interleave(contenders, rounds, clock)
    report(times, SAMPLE_BATCH, "images/s", [("peer repaired", "ours fp32"), ("peer repaired", "ours bf16")])
    if shipped_codes and peer is not None:
        last = measure_shipped(peer, size, shipped_codes, clock)
        print(f"  peer as shipped: {last:.1f} s for the last {shipped_codes} of {size.slots} codes", end="")
        # A code costs its whole prefix, so the last ones cost most: scaled by the tokens that are recomputed.
        lengths = [size.text_length + 1 + slot for slot in range(size.slots)]
        whole = last * sum(lengths) / sum(lengths[-shipped_codes:])
        print("" if shipped_codes == size.slots else f", {whole:.1f} s scaled to all by tokens recomputed")
        for precision in precisions:
            ours = statistics.median(times[f"ours {precision}"])
            print(f"  peer as shipped / ours {precision}: {whole / ours:.1f}x")


def measure_shipped(peer: types.ModuleType, size: Size, codes: int, clock: Clock) -> float:
    sampler = peer_sampler(peer, size, False, codes)
    start = clock()
    sampler()
    return clock() - start


def bench_codec(peer: types.ModuleType | None, size: Size, precisions: list[str], rounds: int, clock: Clock) -> None:
    print("codec, training")
    contenders: Contenders = {}
    for precision in precisions:
        if peer is not None:
            contenders[f"peer {precision}"] = peer_codec_step(peer, precision)
        contenders[f"ours {precision}"] = our_codec_step(size, precision)
    report(interleave(contenders, rounds, clock), CODEC_BATCH, "images/s", PAIRS)


def main() -> None:
    parser = bench_arguments(__doc__, rounds=7)
    parser.add_argument("--peer", type=Path,
                        help="where dalle-pytorch was installed with pip --target; without it ours runs alone")
    parser.add_argument("--part", choices=["training", "sampling", "codec", "all"], default="all")
    parser.add_argument("--shipped-codes", type=int, default=16,
                        help="codes to sample with the peer as shipped, scaled up to 256 (0: skip); it takes minutes")
    parser.add_argument("--full", action="store_true", help="sample all 256 codes with the peer as shipped")
    parser.add_argument("--codec", default=Size.codec, help="preset of ours; shapes_gumbel relaxes as the peer does")
    parser.add_argument("--tiny", action="store_true", help="our models of no use, to see that this script works")
    arguments = parser.parse_args()
    clock, size = set_up(arguments), TINY if arguments.tiny else Size(codec=arguments.codec)
    peer = import_peer(arguments.peer) if arguments.peer else None
    common = (peer, size, arguments.precisions, arguments.rounds, clock)
    if arguments.part in ("training", "all"):
        bench_training(*common)
    if arguments.part in ("sampling", "all"):
        bench_sampling(*common, size.slots if arguments.full else arguments.shipped_codes)
    if arguments.part in ("codec", "all"):
        bench_codec(*common)


if __name__ == "__main__":
    main()
