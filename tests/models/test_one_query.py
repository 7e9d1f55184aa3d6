"""The Triton kernel of one query against two plain products, in Triton's own interpreter, which runs on any CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from small_transformers import make_model
from dalle.models.cuda import one_query
from dalle.models.fixed_decoding import FORMS, FixedMemory, FixedState

one_query.TILE = 8                                       # several tiles, some half empty, some wholly
torch.manual_seed(0)
model = make_model(attention=("full", "row", "conv"), depth=3, head_dim=6)     # no power of two
prefix = model.config.prefix

def outputs(form, layer, slot, active, dtype=torch.float32):
    memory = FixedMemory(model.to(dtype), prefixes=2, sequences=active, rows=3)
    random = torch.Generator().manual_seed(slot)
    for pool in (memory.keys[layer], memory.values[layer]):
        pool[:] = torch.randn(1000, 6, generator=random)[:len(pool)]       # what is not filled yet is garbage
    memory.owners[:] = torch.tensor([1, 0])[:active]
    cache = FixedState(model, memory, active, form).caches[layer].keys_values
    heads = torch.randn(3, 3, 2, 1, 6, generator=random).to(dtype)
    memory.slot.fill_(slot)
    cache.put(memory.slot, heads[1], heads[2])
    return cache.attend(heads[0], None, memory.slot), cache.image_part(cache.keys), cache.image_part(cache.values)

assert one_query.attends_rightly(torch.device("cpu"))
with torch.inference_mode():
    for layer, slot in ((0, prefix), (0, prefix + 9), (1, prefix + 7), (2, prefix + 11)):
        for expected, found in zip(outputs("products", layer, slot, 2), outputs("triton", layer, slot, 2), strict=True):
            torch.testing.assert_close(found, expected)
        assert not outputs("triton", layer, slot, 2)[0][2:].any()
    alone, together = (outputs("triton", 1, prefix + 7, active, torch.bfloat16)[0] for active in (1, 2))
    assert torch.equal(alone[0], together[0])
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_is_two_plain_products():
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, timeout=120, capture_output=True, text=True,
                         check=False)
    assert ran.stdout.strip() == "equal", ran.stderr[-3000:]
