import pytest
import torch
from torch import nn

from dalle.models.transformer import PRESETS, TextToImageTransformer
from dalle.training.deferred import build_player, is_deferred, materialise, players_built

CPU = torch.device("cpu")
TINY = PRESETS["debug"].model_copy(update={"num_text_tokens": 50, "num_codes": 40})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        nn.init.normal_(self.first.weight)


class Reads(nn.Module):
    """Its first weights are computed from one another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linalg.qr(self.layer.weight)[0])


def both(build):
    torch.manual_seed(5)
    plain, after_plain = build(), torch.rand(())
    torch.manual_seed(5)
    with players_built("deferred"):
        deferred = build_player(build)
    return plain, after_plain, deferred, torch.rand(())


@pytest.mark.parametrize("build", [
    lambda: TextToImageTransformer(TINY), Tied, lambda: nn.LayerNorm(3), lambda: nn.Conv2d(3, 2, 3),
    lambda: TextToImageTransformer(TINY.model_copy(update={"positions": "rotary", "norm": "rmsnorm", "qk_norm": True,
                                                           "mlp": "swiglu", "bias": False, "zero_init_heads": True})),
], ids=["transformer", "tied", "constants", "convolution", "modern"])
def test_parameters_made_one_by_one_are_those_of_a_plain_build(build):
    plain, after_plain, deferred, after = both(build)
    assert all(parameter.is_meta for parameter in deferred.parameters()) and after == after_plain
    materialise(deferred, CPU)
    assert after == after_plain and not is_deferred(deferred)
    assert deferred.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in deferred.state_dict().items())


def test_a_part_gets_its_memory_alone_and_tied_weights_stay_tied():
    *_, deferred, _ = both(Tied)
    materialise(deferred, CPU)
    assert deferred.first.weight is deferred.second.weight
    *_, model, _ = both(lambda: TextToImageTransformer(TINY))
    materialise(model.blocks[0], CPU)
    assert not is_deferred(model.blocks[0]) and is_deferred(model.blocks[1])


@pytest.mark.parametrize("build", [Reads, lambda: nn.BatchNorm1d(3)], ids=["reads", "buffers"])
def test_what_does_more_than_fill_parameters_is_built_whole_with_the_same_weights(build, capsys):
    plain, after_plain, built, after = both(build)
    assert "built whole" in capsys.readouterr().out and not is_deferred(built) and after == after_plain
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in built.state_dict().items())


def test_shapes_draw_nothing():
    state = torch.get_rng_state()
    with players_built("shapes"):
        model = build_player(lambda: TextToImageTransformer(PRESETS["12b"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.num_parameters == 12_293_828_224 and is_deferred(model)
