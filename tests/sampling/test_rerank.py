"""Scores, ranks, and what `--rerank` may name."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipConfig, ClipModel
from dalle.sampling.candidates import candidate_seed, ordered, sample_and_rerank
from dalle.sampling.rerank import load_reranker, rank

TINY = {
    "vision": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text": {"layers": 1, "width": 16, "heads": 2},
    "embed_dim": 8, "text_length": 6, "num_text_tokens": 300,
}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("runs") / "clip"
    ClipModel(ClipConfig(**TINY)).save_pretrained(run / "model")
    CaptionTokenizer.train(["a red star"] * 3, vocab_size=280).save(run / "model" / "tokenizer")
    return run


def pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_scores_are_cosines(clip_run):
    reranker = load_reranker(str(clip_run))
    images, captions = pictures(5), ["a red star", "a blue", "a red star", "x", "a blue"]
    model = ClipModel.from_pretrained(clip_run / "model")
    tokenizer = CaptionTokenizer.load(clip_run / "model" / "tokenizer")
    for image, caption, score in zip(images, captions, reranker.score(images, captions), strict=True):
        image_feature = model.encode_image(image[None])[0]
        text_feature = model.encode_text(torch.from_numpy(tokenizer.encode(caption, 6))[None])[0]
        assert float(score) == pytest.approx(float((image_feature @ text_feature).detach()), abs=1e-6)


def test_batches_do_not_change_the_scores(clip_run):
    reranker = load_reranker(str(clip_run / "model"))
    images, captions = pictures(7), [f"caption {number % 3}" for number in range(7)]
    torch.testing.assert_close(reranker.score(images, captions, batch_size=2), reranker.score(images, captions))
    assert reranker.score(images[:0], []).shape == (0,)
    assert reranker.identity["kind"] == "clip" and len(reranker.identity["digest"]) == 16


def test_a_long_caption_is_told(clip_run):
    (warning,) = load_reranker(str(clip_run)).caption_warnings(["a red star", "a red star " * 9])
    assert "reranker" in warning and "first 6 are kept" in warning


def test_rank_is_by_score_and_ties_by_seed():
    assert rank([0.1, 0.5, 0.5, 0.9], [7, 6, 5, 4]) == [3, 2, 1, 0]
    with pytest.raises(UserError, match="not finite"):
        rank([0.1, float("nan")], [0, 1])


def test_the_wrong_kind_of_model_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dvae"}))
    with pytest.raises(UserError, match="holds a 'dvae' model; --rerank needs a 'clip'"):
        load_reranker(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_reranker(str(tmp_path / "none"))


@pytest.mark.parametrize(("spec", "words"), [
    ("open_clip:ViT-B-33/laion2b_s34b_b79k", "nearest: ViT-B-32"),
    ("open_clip:ViT-B-32/laion3b", "laion2b_s34b_b79k"),
    ("open_clip:ViT-B-32", "needs weights"),
    ("open_clip:ViT-B-32//nowhere/weights.pt", "no weights file /nowhere/weights.pt"),
])
def test_open_clip_names_that_lead_nowhere(spec, words):
    with pytest.raises(UserError, match=words) as raised:
        load_reranker(spec)
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_fetched_name_the_way_out(monkeypatch):
    def no_network(*arguments, **options):
        raise RuntimeError("Failed to download weights for tag 'openai': timed out\nmore lines")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(UserError, match="without a network, give a file: open_clip:NAME/PATH"):
        load_reranker("open_clip:ViT-B-32/openai")


def test_a_damaged_weights_file(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="not a plain weights file"):
        load_reranker(f"open_clip:RN50/{tmp_path}/weights.pt")


def test_a_local_hub_folder_ranks(tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(UserError, match="could not be loaded"):
        load_reranker(str(tmp_path))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_model.safetensors")
    for spec in (str(tmp_path), f"open_clip:{tmp_path}"):
        reranker = load_reranker(spec)
        assert reranker.score(pictures(3), ["a", "b", "a"]).shape == (3,)
        assert reranker.identity["kind"] == "open_clip" and len(reranker.identity["digest"]) == 16


class CountingGenerator:
    """Paints its seed and its caption's length; remembers how it was called."""

    image_size = 2
    identity = {"kind": "counting"}

    def __init__(self):
        self.calls = []

    def generate_with_details(self, captions, seeds, on_progress, **options):
        self.calls.append((len(captions), options))
        for number in range(len(seeds)):
            on_progress(number + 1)
        images = torch.stack([torch.full((3, 2, 2), seed % 251, dtype=torch.uint8) for seed in seeds])
        return images, [{"codes": [len(caption)]} for caption in captions]


class BrightReranker:
    identity = {"kind": "bright"}

    def score(self, images, captions):
        return images.float().mean(dim=(1, 2, 3))


def test_candidates_are_ranked_and_keep_their_numbers():
    progress = []
    results = sample_and_rerank(CountingGenerator(), BrightReranker(), ["a", "bb"], 5, seed=3,
                                options={"temperature": 0.5}, on_progress=lambda *state: progress.append(state))
    assert [result.caption for result in results] == ["a", "bb"]
    for prompt, result in enumerate(results):
        scores = [candidate.score for candidate in result.candidates]
        assert scores == sorted(scores, reverse=True) and result.ranked
        assert sorted(candidate.number for candidate in result.candidates) == list(range(5))
        for candidate in result.candidates:
            assert candidate.seed == candidate_seed(3, prompt, candidate.number)
            assert candidate.score == candidate.seed % 251
            assert candidate.details == {"codes": [prompt + 1]}
    assert progress == [(done, 10) for done in range(1, 11)]


def test_without_a_reranker_the_order_is_that_of_the_numbers():
    (result,) = sample_and_rerank(CountingGenerator(), None, ["a"], 4)
    assert [candidate.number for candidate in result.candidates] == [0, 1, 2, 3]
    assert not result.ranked and ordered(result.candidates) == result.candidates


def test_a_candidate_is_the_same_whatever_the_number_asked_for():
    few = sample_and_rerank(CountingGenerator(), None, ["a"], 2, seed=5)[0].candidates
    many = sample_and_rerank(CountingGenerator(), None, ["a"], 300, seed=5)[0].candidates
    assert [candidate.seed for candidate in few] == [candidate.seed for candidate in many[:2]]
    assert len({candidate.seed for candidate in many}) == 300


def test_many_prompts_are_painted_in_whole_captions():
    generator = CountingGenerator()
    results = sample_and_rerank(generator, None, [str(number) for number in range(6)], 200)
    assert [count for count, _ in generator.calls] == [400, 400, 400] and len(results) == 6


def test_seeds_fit_a_torch_generator_and_differ():
    seeds = {candidate_seed(seed, prompt, number) for seed in range(3) for prompt in range(3) for number in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)
    state = np.random.SeedSequence((1, 2, 3)).generate_state(1, np.uint64)[0]
    assert candidate_seed(1, 2, 3) == int(state) // 2
