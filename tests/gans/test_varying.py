"""What is kept and what changes, against pictures painted one by one."""

import pytest
import torch
from bare import CAPTIONS, LetterEncoder

from gans.fusedgan import FusedGANConfig, FusedGANGenerator
from gans.gan_int_cls import GANINTCLSConfig, GANINTCLSGenerator
from gans.generator import GANGenerator
from gans.text import Text
from gans.varying import KINDS, Request, Sheet, between, between_text

PROMPTS = CAPTIONS[:3]


def fused() -> GANGenerator:
    torch.manual_seed(0)
    network = FusedGANGenerator(FusedGANConfig(image_size=16, sentence_dim=8, z_dim=3, condition_dim=4, width=2))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return GANGenerator(network, LetterEncoder())


def make(kind: str, generator: GANGenerator | None = None, **changes) -> Sheet:
    request = Request(generator or fused(), **{"prompts": PROMPTS, "rows": 2, "columns": 4, "seed": 5, **changes})
    assert KINDS[kind].hindrance(request) is None
    return KINDS[kind].make(request)


# but edits, which measure in another way: test_word_edits.py
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "edits"])
def test_every_picture_has_its_place_and_says_what_it_is_made_of(kind):
    sheet = make(kind)
    count = len(sheet.rows) * len(sheet.columns)
    assert sheet.images.shape == (count, 3, 16, 16) and sheet.images.dtype == torch.uint8
    assert len(sheet.made_of) == count and sheet.images.float().std() > 0
    pixels = sheet.images.unflatten(0, (len(sheet.rows), -1)).float()
    assert sheet.figures == {
        "difference_along_rows": pytest.approx(float((pixels[:, 1:] - pixels[:, :-1]).abs().mean())),
        "difference_along_columns": pytest.approx(float((pixels[1:] - pixels[:-1]).abs().mean()))}
    assert torch.equal(make(kind, options={"batch_size": 5}).images, sheet.images)


def test_style_keeps_a_rows_seed_and_a_columns_caption():
    sheet = make("style")
    assert sheet.rows == ["seed 5", "seed 6"] and sheet.columns == ["without a caption", *PROMPTS]
    captions, seeds = [PROMPTS[0], *PROMPTS] * 2, [5] * 4 + [6] * 4
    expected = fused().generate(captions, seeds)
    alone = fused().generate(captions, seeds, unconditional=True)
    for place in range(8):
        assert torch.equal(sheet.images[place], (expected if place % 4 else alone)[place])
        assert sheet.made_of[place] == {"caption": captions[place] if place % 4 else None, "seed": seeds[place]}


def test_a_model_that_paints_nothing_without_a_caption_has_captions_alone():
    torch.manual_seed(0)
    plain = GANGenerator(GANINTCLSGenerator(GANINTCLSConfig(image_size=16, sentence_dim=8, noise_dim=3, width=2)),
                         LetterEncoder())
    sheet = make("style", plain)
    assert sheet.columns == PROMPTS
    assert torch.equal(sheet.images, plain.generate(PROMPTS * 2, [5] * 3 + [6] * 3))
    assert KINDS["detail"].hindrance(Request(plain, PROMPTS)) == "a gan_int_cls model draws no eps, only z"


def test_detail_keeps_the_noise_and_draws_the_augmentation_anew():
    sheet, paints = make("detail", options={"truncation": 0.5}), fused()
    assert sheet.rows == PROMPTS and sheet.columns == ["draw 5", "draw 6", "draw 7", "draw 8"]
    z, eps = paints.noise([5] * 12, 0.5)["z"], paints.noise([5, 6, 7, 8] * 3, 0.5)["eps"]
    captions = [prompt for prompt in PROMPTS for _ in range(4)]
    assert torch.equal(sheet.images, paints.generate(captions, [0] * 12, noise={"z": z, "eps": eps}))
    assert torch.equal(sheet.images[0], paints.generate([PROMPTS[0]], [5], truncation=0.5)[0])


def test_between_two_noises_the_ends_are_those_of_the_seeds():
    sheet, paints = make("noises"), fused()
    eps = paints.noise([5] * 6)["eps"]
    ends = paints.generate([prompt for prompt in PROMPTS for _ in range(2)], [5, 6] * 3, noise={"eps": eps})
    found = sheet.images.unflatten(0, (3, 4))
    assert torch.equal(found[:, [0, -1]].flatten(0, 1), ends)
    assert sheet.columns == ["0%", "33%", "67%", "100%"]


def test_between_two_texts_the_ends_are_the_captions_own():
    sheet, paints = make("texts"), fused()
    assert sheet.rows == [f"{PROMPTS[0]} → {PROMPTS[1]}", f"{PROMPTS[1]} → {PROMPTS[2]}"]
    found = sheet.images.unflatten(0, (2, 4))
    assert torch.equal(found[:, 0], paints.generate(PROMPTS[:2], [5, 5]))
    assert torch.equal(found[:, -1], paints.generate(PROMPTS[1:], [5, 5]))
    one, other = paints.text(PROMPTS[:1]), paints.text(PROMPTS[1:2])
    third = Text((2 * one.sentence + other.sentence) / 3, one.words, one.mask)
    difference = found[0, 1].float() - paints.generate(["x"], [5], text=third)[0].float()
    assert difference.abs().max() <= 1                    # of 255, by rounding


def test_a_network_that_edits_changes_the_same_picture_everywhere():
    class Edits(FusedGANGenerator):
        edits = True

        def paint(self, noise, text, source):
            return source + self.structure(noise["z"]).mean() * 0, {}

    source = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    sheet = make("style", GANGenerator(Edits(fused().network.config), LetterEncoder()), source=source)
    assert torch.equal(sheet.images, source.expand(6, -1, -1, -1)) and sheet.columns == PROMPTS


def test_what_a_request_lacks_is_said():
    blind = GANGenerator(fused().network, None)
    assert KINDS["texts"].hindrance(Request(blind, PROMPTS)) == "this fusedgan model reads no captions"
    assert KINDS["texts"].hindrance(Request(fused(), PROMPTS[:1])) == "it needs 2 prompts: give another --prompt"


def test_between_normal_noises_lies_a_great_circle():
    ends = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    expected = torch.tensor([[3.0, 0.0], [3 * 0.75 ** 0.5, 1.5], [1.5, 3 * 0.75 ** 0.5], [0.0, 3.0]])
    torch.testing.assert_close(between(ends, [0, 1 / 3, 2 / 3, 1], "normal"), expected)
    torch.testing.assert_close(between(ends, [0, 1 / 3, 1], "uniform"), torch.tensor([[3.0, 0], [2, 1], [0, 3]]))


@pytest.mark.parametrize("ends", [[[1.0, 2.0], [1.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
def test_noises_in_one_line_or_of_no_length_are_joined_straight(ends):
    ends = torch.tensor(ends)
    found = between(ends, [0.0, 0.5, 1.0], "normal")
    assert found.isfinite().all() and torch.equal(found[[0, 2]], ends)
    if torch.equal(ends[0], ends[1]):
        assert torch.equal(found[1], ends[0])


def test_between_two_texts_the_words_of_both_are_there():
    first = Text(torch.ones(3, 2), torch.ones(3, 1, 4), torch.tensor([[True, False, False, False]]).expand(3, -1))
    last = Text(torch.full((3, 2), 3.0), torch.full((3, 1, 4), 5.0),
                torch.tensor([[True, True, False, False]]).expand(3, -1))
    found = between_text(first, last, torch.tensor([0.0, 0.25, 1.0]))
    assert found.sentence.tolist() == [[1, 1], [1.5, 1.5], [3, 3]]
    assert found.words[:, 0, 0].tolist() == [1, 2, 5]
    assert found.mask.tolist() == [[True, False, False, False], [True, True, False, False], [True, True, False, False]]
