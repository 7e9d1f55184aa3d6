"""What a generator paints of noise and text that are given to it; what follows from seeds is in ``test_task.py``."""

import pytest
import torch
from test_task import Letters, TinyPainter, generator

from dalle.errors import UserError
from gans.generator import GANGenerator


def test_given_noise_stands_in_the_place_of_what_the_seeds_draw():
    paints, captions = generator(), ["a", "bee", "a", "ee"]
    other = paints.noise([5, 6, 7, 8])["z"]
    found = paints.generate(captions, [1, 2, 3, 4], noise={"z": other}, batch_size=3)
    eps = paints.noise([1, 2, 3, 4])["eps"]
    sentence = paints.text(captions).sentence
    expected = paints.network({"z": other, "eps": eps}, sentence)
    assert torch.equal(found, ((expected + 1) / 2 * 255).round().to(torch.uint8))
    assert torch.equal(paints.generate(captions, [1, 2, 3, 4], noise=paints.noise([1, 2, 3, 4], 0.5)),
                       paints.generate(captions, [1, 2, 3, 4], truncation=0.5))
    assert torch.equal(paints.generate(["a"], [9], noise=paints.noise([1]), truncation=0.5),
                       paints.generate(["a"], [1]))            # what is given is taken as it is


def test_given_text_stands_in_the_place_of_what_the_captions_say():
    paints, captions = generator(), ["a", "bee", "a", "ee"]
    assert torch.equal(paints.generate(["x"] * 4, [1, 2, 3, 4], text=paints.text(captions), batch_size=3),
                       paints.generate(captions, [1, 2, 3, 4]))
    with pytest.raises(UserError, match="reads no captions"):
        GANGenerator(TinyPainter(), None).text(["a"])


@pytest.mark.parametrize(("given", "words"), [
    ({"noise": {"w": torch.zeros(2, 5)}}, "unknown noise 'w'; a tiny model draws z, eps"),
    ({"noise": {"z": torch.zeros(1, 5)}}, r"noise z is \[1, 5\], not \[2, 5\]"),
    ({"text": Letters()(["a"])}, "text of 1 captions for 2 pictures"),
])
def test_given_noise_or_text_of_another_shape_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        generator().generate(["a", "b"], [1, 2], **given)
