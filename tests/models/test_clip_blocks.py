"""open_clip's towers by our forms: the function is open_clip's, what is left out is what nobody reads."""

import open_clip
import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from dalle.models import clip
from dalle.models.clip import ClipConfig, ClipModel
from dalle.models.clip_blocks import TowerBlock, TowerTransformer, encode_ends, pools_the_end
from dalle.models.layers import Linear

VISION = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
TEXT = {"layers": 2, "width": 16, "heads": 2}


def make_pair(monkeypatch, vision=VISION, text=TEXT) -> tuple[ClipModel, ClipModel]:
    """One as it is trained, one as open_clip built it, with the same weights in doubles."""
    torch.manual_seed(0)
    config = ClipConfig(vision=vision, text=text, embed_dim=8, text_length=5, num_text_tokens=30)
    ours = ClipModel(config).double()
    with monkeypatch.context() as patched:
        patched.setattr(clip, "take_over", lambda towers: None)
        theirs = ClipModel(config).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.tensor([[3, 4, 0, 0, 0], [5, 6, 7, 8, 9], [1, 0, 0, 0, 0]])
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=source), text


def features_and_gradients(model: ClipModel) -> list[torch.Tensor]:
    images, text = make_batch()
    output = model(images, text)
    weights = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (output.image_features * weights[0] + output.text_features * weights[1]).sum() * output.logit_scale
    parameters = [one for one in model.parameters() if one.requires_grad]
    return [output.image_features, output.text_features, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize(("vision", "text"), [
    ({}, {}),
    ({"final_ln_after_pool": True, "ls_init_value": 0.1}, {"ls_init_value": 0.1}),
    ({"layers": 1}, {"layers": 1}),
    ({"pool_type": "avg"}, {"proj_bias": True}),
    ({"attentional_pool": True, "attn_pooler_heads": 2}, {"pool_type": "last"}),
], ids=["CLIP", "scaled", "one block", "mean", "attention"])
def test_features_and_gradients_are_open_clips(monkeypatch, vision, text):
    ours, theirs = make_pair(monkeypatch, {**VISION, **vision}, {**TEXT, **text})
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(features_and_gradients(ours), features_and_gradients(theirs))
    with torch.no_grad():
        torch.testing.assert_close(ours(*make_batch())[:2], theirs(*make_batch())[:2])


def test_the_last_blocks_compute_what_is_pooled(monkeypatch):
    """One slot a sequence where gradients are wanted; every slot in evaluation, for those who read the tokens."""
    model, _ = make_pair(monkeypatch)
    shapes = []
    for tower in (model.towers.visual, model.towers):
        for block in tower.transformer.resblocks:
            block.mlp.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    model(*make_batch())
    assert shapes == [(3, 5), (3, 1), (3, 7), (3, 1)]
    shapes.clear()
    with torch.no_grad():
        model(*make_batch())
    assert shapes == [(3, 5)] * 2 + [(3, 7)] * 2


def test_what_is_taken_over_is_what_the_classes_stand_for(monkeypatch):
    ours, theirs = make_pair(monkeypatch)
    kinds = {type(part) for part in ours.modules()}
    assert {TowerBlock, TowerTransformer, Linear} <= kinds and not {nn.Linear, ResidualAttentionBlock} & kinds
    assert {nn.Linear, ResidualAttentionBlock} <= {type(part) for part in theirs.modules()}
    assert pools_the_end(ours.towers) and not pools_the_end(theirs.towers)
    custom, _ = make_pair(monkeypatch, text={**TEXT, "block_type": "custom"})
    assert TowerTransformer not in {type(part) for part in custom.towers.transformer.modules()}
    assert not pools_the_end(custom.towers)
    assert type(custom.towers.visual.transformer) is TowerTransformer


def test_a_caption_without_an_end_token_is_not_asked_for(monkeypatch):
    """The slot of the highest id is pooled, wherever it is: what stands behind it changes nothing."""
    model, _ = make_pair(monkeypatch)
    ids = model.wrap_captions(make_batch()[1])
    changed = torch.where(torch.arange(7) > ids.argmax(dim=1, keepdim=True), 2, ids)
    assert isinstance(model.towers, open_clip.CLIP)
    torch.testing.assert_close(encode_ends(model.towers, ids), encode_ends(model.towers, changed))
