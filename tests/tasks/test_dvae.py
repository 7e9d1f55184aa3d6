"""The dVAE's losses against the paper's formulas worked out by hand, and its task against a plain training loop."""

import logging
import math

import pytest
import torch
from pydantic import ValidationError

from dalle.models.dvae import DiscreteVAE, DVAEOutput
from dalle.models.perceptual import edge_distance
from dalle.models.quantizers import GumbelConfig
from dalle.tasks import dvae
from dalle.tasks.dvae import (
    CodeUsage,
    CosineRamp,
    DVAELossConfig,
    DVAERun,
    DVAETask,
    kl_to_uniform,
    logit_laplace_nll,
    peak_signal_to_noise,
    squared_error,
    uneven_usage,
)
from dalle.training.figures import Max, joined_values


class Networks:
    """What the engine hands out, with one bare model behind it."""

    rank, world_size = 0, 1

    def __init__(self, model):
        self.model = model

    def __getitem__(self, name):
        assert name == "dvae"
        return self.model

    def bare(self, name):
        assert name == "dvae"
        return self.model


def run_config(steps: int = 100, model: dict | None = None, loss: dict | None = None) -> DVAERun:
    return DVAERun.model_validate(
        {
            "task": "dvae",
            "name": "test",
            "model": {"preset": "tiny", **(model or {})},
            "loss": loss or {},
            "data": {"train": "nowhere", "image_size": (model or {}).get("image_size", 16)},
            "train": {"steps": steps, "batch_size": 4},
        }
    )


COSINE = {"quantizer": GumbelConfig(num_codes=8, logits="cosine", dim=4).model_dump()}
LAPLACE = {
    "image_size": 64,
    "likelihood": "logit_laplace",
    "network": {"kind": "openai", "hidden": 8, "decoder_input": 4},
    "quantizer": {"kind": "gumbel", "num_codes": 5},
}


def batch_of(count: int = 4, side: int = 16) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)}


# --- the likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mapped", "log_density"), [(0.5, math.log(2)), (0.1, -0.482426), (0.9, -0.482426)])
def test_logit_laplace_at_points_worked_out_by_hand(mapped, log_density):
    image = torch.full((1, 1, 1, 1), (mapped - 0.1) / 0.8)
    zeros = torch.zeros(1, 1, 1, 1)
    assert float(logit_laplace_nll(zeros, zeros, image)) == pytest.approx(-log_density, abs=1e-5)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.0, -1.0), (-0.5, 0.5)])
def test_logit_laplace_integrates_to_one_over_the_unit_interval(mean, log_scale):
    # the mapped pixel runs over (0, 1) when the pixel runs over (-1/8, 9/8); in logit space tails are reached evenly
    logit = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    x = logit.sigmoid()
    images = ((x - 0.1) / 0.8).view(-1, 1, 1, 1)
    ones = torch.ones_like(images)
    density = (-logit_laplace_nll(mean * ones, log_scale * ones, images)).exp()
    keep = (x > 1e-9) & (x < 1 - 1e-9)
    assert float(torch.trapezoid(density[keep], x[keep])) == pytest.approx(1, abs=1e-3)


def test_logit_laplace_is_summed_over_a_picture_and_kept_apart_between_pictures():
    images = torch.stack([torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2)])
    zeros = torch.zeros(2, 3, 2, 2)
    by_hand = [-12 * math.log(2), 12 * 0.482426]
    assert logit_laplace_nll(zeros, zeros, images).tolist() == pytest.approx(by_hand, abs=1e-4)


def test_a_floor_bounds_what_a_collapsed_scale_can_win():
    image, mean = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, 1, 1, 1)
    collapsed = torch.full((1, 1, 1, 1), -50.0)
    assert float(logit_laplace_nll(mean, collapsed, image, floor=-7.0)) == pytest.approx(-math.log(2) - 7)
    assert float(logit_laplace_nll(mean, collapsed, image)) == pytest.approx(-math.log(2) - 50)


def test_squared_error_is_on_minus_one_to_one():
    assert squared_error(torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)).tolist() == [48.0, 48.0]


# --- the divergence ---------------------------------------------------------------------------------------------------


def test_kl_is_zero_for_equal_logits_and_ln_k_a_position_for_certainty():
    even = torch.zeros(2, 3, 3, 8192).log_softmax(dim=-1)
    assert kl_to_uniform(even).tolist() == pytest.approx([0, 0], abs=1e-3)
    certain = torch.full((1, 32, 32, 16), -1e4)
    certain[..., 3] = 1e4
    assert float(kl_to_uniform(certain.log_softmax(dim=-1))) == pytest.approx(1024 * math.log(16), rel=1e-5)


def test_kl_of_a_small_categorical_written_out():
    q = torch.tensor([0.5, 0.25, 0.25])
    by_hand = sum(p * math.log(p / (1 / 3)) for p in q.tolist())
    assert float(kl_to_uniform(q.log().view(1, 1, 1, 3))) == pytest.approx(by_hand, abs=1e-6)


def test_even_usage_is_of_the_mean_over_all_positions():
    certain_but_different = torch.eye(4).clamp_min(1e-30).log().view(1, 2, 2, 4)
    assert float(uneven_usage(certain_but_different)) == pytest.approx(0, abs=1e-5)
    always_the_first = torch.tensor([1.0, 0, 0, 0]).clamp_min(1e-30).log().expand(1, 2, 2, 4)
    assert float(uneven_usage(always_the_first)) == pytest.approx(math.log(4), abs=1e-5)


def test_even_usage_has_a_finite_gradient_where_a_code_is_impossible():
    logits = torch.tensor([0.0, 0.0, -500.0]).view(1, 1, 1, 3).requires_grad_()
    uneven_usage(logits.log_softmax(dim=-1)).backward()
    assert torch.isfinite(logits.grad).all()


# --- the whole loss ---------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """Gives one output whatever it is shown."""

    def __init__(self, output: DVAEOutput):
        super().__init__()
        self.output = output

    def forward(self, images, temperature):
        return self.output


def test_loss_is_the_bound_divided_by_the_values_of_the_picture():
    """At 256 pixels the divisor is 196,608 and the KL of a mean position weighs beta / 192."""
    task = DVAETask(run_config(steps=3_000_000, model=LAPLACE))
    logits = torch.zeros(1, 5, 32, 32)
    logits[:, 0] = 2.0
    zeros = torch.zeros(1, 3, 256, 256)
    output = DVAEOutput(zeros, zeros, logits, logits.argmax(dim=1).flatten(1))
    images = torch.full((1, 3, 256, 256), 0.5)
    batch = {"image": images, **task.annealed(2500, images.device)}         # beta is 3.3 there
    loss = task.reconstruct(Networks(Fixed(output)), batch, step=2500)
    p = [math.exp(2) / (math.exp(2) + 4)] + [1 / (math.exp(2) + 4)] * 4
    kl_position = sum(q * (math.log(q) + math.log(5)) for q in p)
    assert float(loss.total) == pytest.approx(-math.log(2) + 3.3 / 192 * kl_position, rel=1e-4)
    assert float(loss.parts["kl_per_position"]) == pytest.approx(kl_position, rel=1e-4)
    assert float(loss.parts["nll_per_value"]) == pytest.approx(-math.log(2), rel=1e-4)


def test_optional_terms_are_added_with_their_weights():
    config = {"even_usage": 2.0, "edges": 0.5, "beta": {"start": 0, "end": 0}}
    task = DVAETask(run_config(model=COSINE, loss=config))
    logits = torch.zeros(2, 8, 2, 2)
    logits[:, 1] = 1e3                                                                   # always the same code
    means = torch.rand(2, 3, 16, 16)
    images = torch.rand(2, 3, 16, 16)
    output = DVAEOutput(means, None, logits, logits.argmax(dim=1).flatten(1))
    batch = {"image": images, **task.annealed(0, images.device)}
    total = float(task.reconstruct(Networks(Fixed(output)), batch, step=0).total)
    squares = float((4 * (means - images) ** 2).mean())
    edges = float(edge_distance(2 * means, 2 * images).mean())
    assert total == pytest.approx(squares + 2.0 * 4 * math.log(8) / 768 + 0.5 * edges, rel=1e-4)


def test_edge_distance_of_two_known_pictures():
    flat, other = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.25)
    assert float(edge_distance(flat, other)) == pytest.approx(0.25)                     # no edges: the lowest band only
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert float(edge_distance(stripes, flat)) == pytest.approx(1.0)                     # finest band only: means are 0


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "temperature"),
    [(0, 1.0), (37_500, 0.862706), (75_000, 0.53125), (112_500, 0.199794), (150_000, 0.0625), (2_000_000, 0.0625)],
)
def test_temperature_at_the_papers_points(step, temperature):
    assert DVAELossConfig().temperature.at(step, 3_000_000) == pytest.approx(temperature, abs=1e-6)


@pytest.mark.parametrize(("step", "beta"), [(0, 0.0), (2_500, 3.3), (5_000, 6.6), (1_000_000, 6.6)])
def test_beta_at_the_papers_points(step, beta):
    assert DVAELossConfig().beta.at(step, 3_000_000) == pytest.approx(beta, abs=1e-6)


def test_schedules_scale_with_the_run_but_beta_keeps_500_updates():
    loss = DVAELossConfig()
    assert loss.temperature.at(500, 20_000) == pytest.approx(0.53125)
    assert loss.beta.at(250, 20_000) == pytest.approx(3.3)


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, COSINE, LAPLACE])
def test_a_few_steps_lower_the_loss(model):
    torch.manual_seed(0)
    task = DVAETask(run_config(steps=60, model=model, loss={"beta": {"start": 0, "end": 0}}))
    network = task.players["dvae"].module
    networks = Networks(network)
    batch = task.prepare(batch_of(side=model.get("image_size", 16)), networks, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        loss = task.phases[0].loss(networks, batch, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
        parts = [part.maximum if isinstance(part, Max) else part for part in loss.parts.values()]
        assert all(not part.requires_grad for part in parts)
    assert losses[-1] < losses[0]
    assert set(task.metrics(20)) >= {"codes_used", "perplexity"}


def test_prepare_gives_pictures_on_zero_to_one():
    task = DVAETask(run_config())
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    prepared = task.prepare({"image": image, "key": ["a"]}, Networks(task.players["dvae"].module), 0)
    assert prepared["image"].flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert prepared["key"] == ["a"]


def test_validation_measures_the_hard_path():
    task = DVAETask(run_config())
    model = task.players["dvae"].module.eval()
    batches = [batch_of(4), batch_of(2)]
    figures = task.validate(Networks(model), batches)
    expected = []
    for batch in batches:
        for image in batch["image"].float() / 255:
            rebuilt = model.decode(model.encode(image[None]))[0]
            expected.append(10 * math.log10(1 / float(((rebuilt - image) ** 2).mean())))
    assert figures["psnr"].value == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert figures["psnr"].count == 6
    codes = torch.cat([model.encode(batch["image"].float() / 255).flatten() for batch in batches])
    assert figures["codes_used"].value == len(codes.unique())
    assert "relaxed_gain_db" not in figures                                              # FSQ has nothing relaxed


def test_validation_of_a_relaxation_reports_the_gap_and_repeats_itself():
    task = DVAETask(run_config(model=COSINE))
    model = task.players["dvae"].module.eval()
    first, second = (task.validate(Networks(model), [batch_of()])["relaxed_gain_db"].value for _ in range(2))
    assert math.isfinite(first) and first == second


def test_a_collapsed_codebook_is_reported(caplog):
    task = DVAETask(run_config())
    model = task.players["dvae"].module
    with torch.no_grad():
        model.encoder.output.weight.zero_()                                              # every position the same code
    with caplog.at_level(logging.WARNING):
        task.validate(Networks(model), [batch_of(64)])
    assert "only 1 of 16 codes are in use" in caplog.text


def test_preview_is_originals_over_reconstructions(monkeypatch):
    task = DVAETask(run_config())
    images = batch_of(8)["image"]
    monkeypatch.setattr(dvae, "train_batches", lambda config, **options: [{"image": images}])
    model = task.players["dvae"].module.eval()
    first, second = (task.preview(Networks(model), step)["reconstruction"] for step in (0, 5))
    assert first.shape == (3, 32, 8 * 16) and first.dtype == torch.uint8
    assert torch.equal(first[:, :16, 16:32], images[1])
    assert torch.equal(first, second)


def test_export_can_be_loaded(tmp_path):
    task = DVAETask(run_config(model=COSINE))
    model = task.players["dvae"].module
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    task.export(tmp_path, {"dvae": average})
    loaded = DiscreteVAE.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.state_dict().items())


def test_task_knows_its_cost():
    task = DVAETask(run_config())
    assert task.tokens_per_sample == 4
    # the first convolution alone: 4x4 positions, 48 -> 8 channels, 3x3, two FLOPs each, three times for training
    assert task.flops_per_sample > 3 * 2 * 16 * 48 * 8 * 9


def test_a_picture_size_that_is_not_the_datas_is_refused():
    config = run_config().model_dump()
    config["data"]["image_size"] = 32
    with pytest.raises(ValidationError, match="model.image_size 16 is not data.image_size 32"):
        DVAERun.model_validate(config)


@pytest.mark.parametrize(
    ("loss", "message"), [({"even_usage": 1.0}, "even_usage needs a categorical"), ({"edge": 1.0}, "edge")]
)
def test_impossible_losses_are_refused(loss, message):
    with pytest.raises(ValidationError, match=message):
        run_config(loss=loss)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_usage_counts_and_perplexity_by_hand():
    usage = CodeUsage(num_codes=4, window=None)
    assert values(usage) == {"codes_used": 0, "perplexity": 0}
    usage.add(torch.tensor([[0, 0], [1, 3]]))
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert values(usage) == {"codes_used": 3, "perplexity": pytest.approx(math.exp(entropy))}


def values(*shares: CodeUsage) -> dict[str, float]:
    return joined_values([usage.figures() for usage in shares])


def test_usage_forgets_what_is_two_windows_old():
    usage = CodeUsage(num_codes=4, window=2)
    for step, code in enumerate((0, 1, 2)):
        usage.add(torch.tensor([code, code]), step)
    assert values(usage)["codes_used"] == 2                                              # 1 and 2


def test_counts_are_exact_where_floats_would_stand_still():
    usage = CodeUsage(num_codes=2, window=None)
    usage._counts = torch.tensor([2**24, 0])
    usage.add(torch.tensor([0]))
    assert usage.figures()["codes_used"].counts.tolist() == [2**24 + 1, 0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_usage_of_the_ranks_is_that_of_one_process(micro_batches):
    """Over windows of 40 codes, 16 a step: neither the ranks nor the micro-batches change what is counted."""
    torch.manual_seed(0)
    steps = torch.randint(0, 64, (9, 4, 4))
    whole, ranks = CodeUsage(64, window=40), [CodeUsage(64, window=40) for _ in range(2)]
    for step, codes in enumerate(steps):
        whole.add(codes, step)
        for rank, usage in enumerate(ranks):
            for part in codes[rank::2].chunk(micro_batches):
                usage.add(part, step, ranks=2)
        recent = steps[max(0, step // 3 * 3 - 3):step + 1].flatten()           # 48 codes are the first to fill a window
        shares = recent.bincount() / len(recent)
        expected = {"codes_used": len(recent.unique()), "perplexity": pytest.approx(2 ** float(
            -(shares[shares > 0] * shares[shares > 0].log2()).sum()), rel=1e-5)}
        assert values(whole) == values(*ranks) == expected


def test_validation_counts_the_codes_of_all_ranks():
    """Each rank sees its own pictures only; averaged, the codes in use would be too few."""
    torch.manual_seed(0)
    task = DVAETask(run_config())
    networks = Networks(task.players["dvae"].module.eval())
    batches = [{"image": torch.full((2, 3, 16, 16), value, dtype=torch.uint8)} for value in (0, 255)]
    whole = joined_values([task.validate(networks, batches)])
    shares = [task.validate(networks, [batch]) for batch in batches]
    assert joined_values(shares) == pytest.approx(whole)
    assert whole["codes_used"] > max(share["codes_used"].value for share in shares)


def test_psnr_by_hand():
    images, others = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.1)
    assert peak_signal_to_noise(images, others).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert peak_signal_to_noise(images, images).tolist() == [100, 100]


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="has to be above 0"):
        DVAELossConfig(temperature=CosineRamp(start=1.0, end=0.0))
