"""Writing image codes after captions with a static key-value cache: sampling, guidance, completion.

A candidate is a pure function of (model, precision, caption, seed, options): its randomness is one number a code from
its own generator, and products with weights are always over rows of one fixed number, filled up where candidates run
out, because a matrix product of another shape may round differently. What is over fewer rows (attention by our own
kernel on CUDA, the choice of a code) computes each row by itself, in an order that knows nothing of the others.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dalle.errors import UserError
from dalle.models.decoding import DecodingState, cache_bytes, decode_step, for_decoding, prefill
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.choosing import SamplingConfig, choose_codes, guide
from dalle.sampling.fixed import active_candidates, forget, write_fixed

BATCH_SIZE = {"cpu": 16, "cuda": 64}    # candidates side by side where memory allows
CPU_CACHE_BYTES = 2 << 30
PREFILL_ROWS = 4                        # captions run through the model at once
# growing: the host knows the slot, and reads what is filled. fixed: steps of one shape, the slot on the device;
# captured: these as a CUDA graph; compiled: the graph of a step that went through torch.compile.
Method = Literal["auto", "growing", "fixed", "captured", "compiled"]
METHOD = {"cuda": "captured"}           # auto, by type of device; growing elsewhere


def sample_codes(model: TextToImageTransformer, text: Tensor, seeds: Sequence[int],
                 options: SamplingConfig | None = None, known_codes: Tensor | None = None,
                 batch_size: int | None = None, dtype: torch.dtype | None = None,
                 on_progress: Callable[[float], None] = lambda candidates: None, method: Method = "auto") -> Tensor:
    """Codes int64 [n, N], on the model's device, for n = len(seeds) candidates.

    ``text`` [P, T] holds P captions, each with n / P candidates: candidate i continues caption i // (n / P). Each
    caption is computed once. ``known_codes``, [k] or [P, k] with k < N, are the first codes of every candidate and
    come back unchanged. ``on_progress`` is told now and then how many candidates' worth of them are done.
    ``batch_size`` (default: by device and memory), ``dtype`` (default: the weights') and ``method`` may change
    the last bits of the logits; how many candidates are asked for at once does not. Raises ``ValueError`` for sizes
    that do not fit and for ids and codes that the model does not have, ``UserError`` for logits that are not finite.
    """
    options = options or SamplingConfig()
    config, device = model.config, model.start.device
    if len(text) == 0 or len(seeds) % len(text):
        raise ValueError(f"{len(seeds)} seeds cannot be shared equally by {len(text)} captions")
    known = _known_codes(known_codes, len(text), config).to(device)
    check_range("text ids", text, config.num_text_tokens)
    text, per_caption = text.to(device), len(seeds) // len(text)
    batch_size = batch_size or default_batch_size(config, dtype or model.start.dtype, device, options.streams)
    method = METHOD.get(device.type, "growing") if method == "auto" else method
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            decoder = for_decoding(model, dtype, options.streams * batch_size)
            drawn = uniforms(seeds, config.num_image_slots).to(device)
            codes = torch.zeros(len(seeds), config.num_image_slots, dtype=torch.int64, device=device)
            for candidates, rows, logits, state in _batches(decoder, text, known, per_caption, batch_size, options):
                share = partial(part_done, on_progress, candidates)
                numbers = drawn[[candidates[min(place, len(candidates) - 1)] for place in range(batch_size)]]
                if method == "growing":
                    written, finite = _decode(decoder, state.expand(rows), logits[rows], numbers, known.shape[1],
                                              options, share)
                else:
                    places = active_candidates(decoder, len(candidates), batch_size)
                    rows = rows.view(options.streams, batch_size)[:, :places].flatten()
                    written, finite = write_fixed(decoder, state, logits, rows, numbers[:places], batch_size, options,
                                                  method, share)
                if not finite:
                    raise UserError("the transformer's logits are not finite: its weights are damaged")
                codes[candidates.start:candidates.stop] = written[:len(candidates)]
            codes[:, :known.shape[1]] = known.repeat_interleave(per_caption, dim=0)
    finally:
        model.train(was_training)
        if was_training:
            forget(model)
    return codes.clone()  # an ordinary tensor, not one of inference mode


def _known_codes(known: Tensor | None, captions: int, config: TransformerConfig) -> Tensor:
    if known is None:
        return torch.empty(captions, 0, dtype=torch.int64)
    if known.ndim not in (1, 2) or (known.ndim == 2 and len(known) != captions):
        raise ValueError(f"known_codes {tuple(known.shape)} is neither [k] nor [{captions}, k]")
    if known.shape[-1] >= config.num_image_slots:
        raise ValueError(f"{known.shape[-1]} known codes leave nothing to sample of {config.num_image_slots}")
    check_range("known codes", known, config.num_codes)
    return known.expand(captions, -1)


def check_range(what: str, ids: Tensor, count: int) -> None:
    """``ValueError`` for one outside 0 to ``count`` - 1; waits for the device, once a call of :func:`sample_codes`."""
    if ids.numel() and (ids.min() < 0 or ids.max() >= count):
        raise ValueError(f"{what} from {int(ids.min())} to {int(ids.max())} where the model has 0 to {count - 1}")


def default_batch_size(config: TransformerConfig, dtype: torch.dtype, device: torch.device, streams: int) -> int:
    """The device's usual batch, halved until its caches take at most half of the device's whole memory.

    It looks at nothing that changes from call to call, so that a seed gives the same picture tomorrow.
    """
    is_cuda = device.type == "cuda"
    budget = torch.cuda.get_device_properties(device).total_memory // 2 if is_cuda else CPU_CACHE_BYTES
    size = BATCH_SIZE.get(device.type, BATCH_SIZE["cpu"])
    while size > 1 and size * streams * cache_bytes(config, dtype) > budget:
        size //= 2
    return size


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), float64 [len(seeds), count], row i from a generator seeded with ``seeds[i]`` alone.

    Drawn in fp32 on the CPU, so that they are the same on every device and stay below 1 in later products.
    """
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).double() if rows else torch.empty(0, count, dtype=torch.float64)


def _batches(model: TextToImageTransformer, text: Tensor, known: Tensor, per_caption: int, batch_size: int,
             options: SamplingConfig) -> Iterator[tuple[range, Tensor, Tensor, DecodingState]]:
    """(candidates, the rows they go on from, logits, state) for each batch; ``batch_size`` captions a prefill.

    The rows [streams * batch_size] are filled up with copies of the last candidate's.
    """
    for first in range(0, len(text) if per_caption else 0, batch_size):
        captions = range(first, min(first + batch_size, len(text)))
        logits, state = _prefill(model, text[first:captions.stop], known[first:captions.stop], options.streams)
        end = captions.stop * per_caption
        for start in range(first * per_caption, end, batch_size):
            candidates = range(start, min(start + batch_size, end))
            rows = torch.tensor([candidates[min(place, len(candidates) - 1)] // per_caption - first
                                 for place in range(batch_size)], device=text.device)
            rows = torch.cat([rows + stream * len(captions) for stream in range(options.streams)])
            yield candidates, rows, logits, state


def _prefill(model: TextToImageTransformer, text: Tensor, known: Tensor, streams: int) -> tuple[Tensor, DecodingState]:
    """Logits and state of p captions, and after them (guidance) of p empty captions; ``PREFILL_ROWS`` at a time."""
    if streams == 2:
        text, known = torch.cat([text, torch.zeros_like(text)]), torch.cat([known, known])
    rows = -(-len(text) // PREFILL_ROWS) * PREFILL_ROWS
    filled = torch.arange(rows, device=text.device).clamp_(max=len(text) - 1)
    parts = [prefill(model, text[part], known[part]) for part in filled.split(PREFILL_ROWS)]
    return torch.cat([logits for logits, _ in parts]), DecodingState.join([state for _, state in parts])


def _decode(model: TextToImageTransformer, state: DecodingState, logits: Tensor, numbers: Tensor,
            first: int, options: SamplingConfig, on_share: Callable[[float], None]) -> tuple[Tensor, Tensor]:
    """Codes [B, N] from slot ``first`` on (zeros before it), given the logits of that slot and the state before it.

    And whether all logits were finite.
    """
    codes = torch.zeros(numbers.shape, dtype=torch.int64, device=numbers.device)
    finite = torch.ones((), dtype=torch.bool, device=numbers.device)      # read once a batch, not at every code
    last = numbers.shape[1] - 1
    for slot in range(first, last + 1):
        guided = guide(logits, options)
        finite &= guided.amax(dim=-1).isfinite().all()         # of NaN, infinity or nothing else there is no softmax
        codes[:, slot] = choose_codes(guided, numbers[:, slot], options)
        if slot < last:
            logits = decode_step(model, codes[:, slot].repeat(options.streams), state)
        on_share((slot + 1 - first) / (last + 1 - first))
    return codes, finite


def part_done(on_progress: Callable[[float], None], candidates: range, share: float) -> None:
    """Tell that of the batch ``candidates`` this share is done, and all before it."""
    on_progress(candidates.start + share * len(candidates))
