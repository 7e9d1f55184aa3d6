#!/usr/bin/env python
"""Training and sampling speed against lucidrains' dalle-pytorch 1.6.6, interleaved in one process.

The peer is installed apart, so that the project's environment stays as it is:

    pip install --target PEER --no-deps dalle-pytorch==1.6.6 axial_positional_embedding rotary-embedding-torch einops
    python tools/bench/dalle_pytorch.py --peer PEER --threads 2

It cannot be imported as it is (its taming-transformers and youtokentome no longer install), so empty stand-ins for
modules that the measured code never calls are put in their place. Contenders take turns in shuffled rounds; a ratio is
the median over rounds of peer time / our time, so that a busy neighbour slows both sides of it.

Configuration: width 256, depth 8, 8 heads of 32, 32 text + 256 image tokens, text vocabulary 10,000, 512 codes, token
shift, rotary positions, GEGLU x4; training batch 8 with Adam (peer) or fused AdamW (ours), clipping at 0.5; sampling
batch 16 with full attention. Codes are given: no codec is in the measured step.
"""

import argparse
import importlib.machinery
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.decode import SamplingConfig, sample_codes

TEXT_LENGTH, GRID, NUM_WORDS, NUM_CODES = 32, (16, 16), 10_000, 512
TRAIN_BATCH, SAMPLE_BATCH = 8, 16
CLIP = 0.5
PATTERNS = {  # ours: the peer's
    "full": (("full",), ("full",)),
    "sparse": (("row", "column", "conv"), ("axial_row", "axial_col", "conv_like")),
}
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


def build_peer(peer: types.ModuleType, pattern: str) -> torch.nn.Module:
    codec = peer.DiscreteVAE(image_size=64, num_layers=2, num_tokens=NUM_CODES, codebook_dim=64, hidden_dim=16)
    return peer.DALLE(dim=256, vae=codec, num_text_tokens=NUM_WORDS, text_seq_len=TEXT_LENGTH, depth=8, heads=8,
                      dim_head=32, attn_types=PATTERNS[pattern][1], shift_tokens=True, rotary_emb=True)


def build_ours(pattern: str) -> TextToImageTransformer:
    return TextToImageTransformer(TransformerConfig(
        dim=256, depth=8, heads=8, head_dim=32, text_length=TEXT_LENGTH, num_text_tokens=NUM_WORDS, grid=GRID,
        num_codes=NUM_CODES, attention=PATTERNS[pattern][0], conv_kernel=5, positions="rotary", mlp="geglu",
        token_shift=True))


def random_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randint(1, NUM_WORDS, (size, TEXT_LENGTH)),
            torch.randint(0, NUM_CODES, (size, GRID[0] * GRID[1])))


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


def training_contenders(peer: types.ModuleType, pattern: str) -> dict[str, Callable[[], None]]:
    """A training step of each side in fp32 and bf16."""
    theirs, ours = build_peer(peer, pattern), build_ours(pattern)
    text, codes = random_batch(TRAIN_BATCH)
    print(f"  parameters: peer {sum(p.numel() for p in theirs.parameters() if p.requires_grad):,}, "
          f"ours {ours.num_parameters:,}")

    def our_loss() -> torch.Tensor:
        text_logits, image_logits = ours(text, codes)
        text_ce = F.cross_entropy(text_logits.flatten(0, 1), ours.text_targets(text).flatten())
        return (text_ce + 7 * F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())) / 8

    adam = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=3e-4)
    adamw = torch.optim.AdamW(ours.parameters(), lr=3e-4, fused=True)
    sides = {"peer": (lambda: theirs(text.clone(), codes, return_loss=True), theirs, adam),
             "ours": (our_loss, ours, adamw)}
    return {f"{name} {precision}": training_step(loss, model, optimizer, precision == "bf16")
            for name, (loss, model, optimizer) in sides.items() for precision in ("fp32", "bf16")}


def peer_sampler(peer: types.ModuleType, repaired: bool, codes: int) -> Callable[[], None]:
    """The peer's ``generate_images`` with use_cache=True, writing the last ``codes`` of 256 image tokens.

    As shipped, ``forward_with_cond_scale`` drops the cache it is given, so every token recomputes its whole prefix.
    ``repaired`` passes the cache on. Fewer codes than 256 start from known ones, which cost the peer one full pass.
    """
    model = build_peer(peer, "full").eval()
    if repaired:
        model.forward_with_cond_scale = lambda *inputs, cond_scale=1, cache=None: model(*inputs, cache=cache)
    text, _ = random_batch(SAMPLE_BATCH)
    model.vae.decode = lambda sequence: sequence          # no codec in the figure
    known = GRID[0] * GRID[1] - codes
    model.vae.get_codebook_indices = lambda images: torch.zeros(len(images), GRID[0] * GRID[1], dtype=torch.long)
    image = torch.zeros(SAMPLE_BATCH, 3, 64, 64) if known else None
    return lambda: model.generate_images(text.clone(), use_cache=True, img=image, num_init_img_tokens=known or None)


def our_sampler(dtype: torch.dtype) -> Callable[[], None]:
    """Ours on the same work: 16 different captions, half of the vocabulary kept."""
    model = build_ours("full").to(dtype).eval()
    text, _ = random_batch(SAMPLE_BATCH)
    options = SamplingConfig(top_k=NUM_CODES // 2)
    return lambda: sample_codes(model, text, list(range(SAMPLE_BATCH)), options)


def interleave(contenders: dict[str, Callable[[], None]], rounds: int,
               clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each contender in each of ``rounds`` rounds, after a warm-up, in a new order each round."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = clock()
            contenders[name]()
            times[name].append(clock() - start)
    return times


def report(times: dict[str, list[float]], work: float, unit: str, pairs: list[tuple[str, str]]) -> None:
    """Medians of each contender, then the median of per-round ratios for each (slow, fast) pair."""
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:20s} {median * 1e3:10.1f} ms  {work / median:10.1f} {unit}")
    for slow, fast in pairs:
        ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
        best = min(times[slow]) / min(times[fast])
        print(f"  {slow} / {fast}: {statistics.median(ratios):.2f}x (fastest rounds {best:.2f}x)")


def bench_training(peer: types.ModuleType, rounds: int, clock: Callable[[], float]) -> None:
    tokens = TRAIN_BATCH * (TEXT_LENGTH + GRID[0] * GRID[1])
    for pattern in PATTERNS:
        print(f"training, {pattern}")
        times = interleave(training_contenders(peer, pattern), rounds, clock)
        report(times, tokens, "tokens/s",
               [("peer fp32", "ours bf16"), ("peer fp32", "ours fp32"), ("peer bf16", "ours bf16")])


def bench_sampling(peer: types.ModuleType, rounds: int, clock: Callable[[], float], shipped_codes: int) -> None:
    print("sampling, full attention")
    contenders = {"peer repaired": peer_sampler(peer, True, GRID[0] * GRID[1]),
                  "ours fp32": our_sampler(torch.float32), "ours bf16": our_sampler(torch.bfloat16)}
    times = interleave(contenders, rounds, clock)
    report(times, SAMPLE_BATCH, "images/s", [("peer repaired", "ours fp32"), ("peer repaired", "ours bf16")])
    if shipped_codes:
        all_codes = GRID[0] * GRID[1]
        last = measure_shipped(peer, shipped_codes, clock)
        print(f"  peer as shipped: {last:.1f} s for the last {shipped_codes} of {all_codes} codes", end="")
        # A code costs its whole prefix, so the last ones cost most: scaled by the tokens that are recomputed.
        lengths = [TEXT_LENGTH + 1 + slot for slot in range(all_codes)]
        whole = last * sum(lengths) / sum(lengths[-shipped_codes:])
        print("" if shipped_codes == all_codes else f", {whole:.1f} s scaled to all by tokens recomputed")
        print(f"  peer as shipped / ours bf16: {whole / statistics.median(times['ours bf16']):.1f}x")


def measure_shipped(peer: types.ModuleType, codes: int, clock: Callable[[], float]) -> float:
    sampler = peer_sampler(peer, False, codes)
    start = clock()
    sampler()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="where dalle-pytorch was installed with pip --target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the process's own processor seconds, for a machine shared with others; one thread")
    parser.add_argument("--part", choices=["training", "sampling", "all"], default="all")
    parser.add_argument("--shipped-codes", type=int, default=16,
                        help="codes to sample with the peer as shipped, scaled up to 256 (0: skip); it takes minutes")
    parser.add_argument("--full", action="store_true", help="sample all 256 codes with the peer as shipped")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)   # waiting threads would count as work
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.manual_seed(0)
    random.seed(0)
    peer = import_peer(arguments.peer)
    if arguments.part in ("training", "all"):
        bench_training(peer, arguments.rounds, clock)
    if arguments.part in ("sampling", "all"):
        shipped_codes = GRID[0] * GRID[1] if arguments.full else arguments.shipped_codes
        bench_sampling(peer, arguments.rounds, clock, shipped_codes)


if __name__ == "__main__":
    main()
