"""The evaluation of a stub whose every picture is known: figures, prefixes, what is kept, what is refused."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_stubs import Redness, StubGenerator, colour, png

from dalle.data.index import ShardIndex
from dalle.errors import UserError
from dalle.evaluation import pictures
from dalle.evaluation.captions import draw_captions
from dalle.evaluation.job import check
from dalle.evaluation.measure import tell_lost
from dalle.evaluation.references import ShardReferences
from dalle.metrics.distributions import Moments, frechet_distance, inception_score
from dalle.sampling.candidates import candidate_seed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pictures, "BLOCK_CAPTIONS", 2)


def figures(results) -> dict[tuple, float]:
    return {(row.metric, *row.place[1:]): row.value for row in results.rows}


def winners(job, count: int) -> np.ndarray:
    """float [samples, 3]: the reddest of the first ``count`` colours of every caption."""
    drawn, _ = draw_captions(ShardIndex.load(job.data), job.samples, job.seed)
    reddest = [max((colour(one.caption, candidate_seed(job.seed, place, number)) for number in range(count)),
                   key=lambda candidate: candidate[0]) for place, one in enumerate(drawn)]
    return np.stack(reddest) / np.float32(255)


def test_figures_are_those_of_the_best_of_each_prefix(job, evaluate):
    results, _ = evaluate(job)
    references = ShardReferences(job.data)
    real = np.stack([references.picture(number, 16).mean(axis=(0, 1)) / 255 for number in range(len(references))])
    moments = Moments.of(torch.from_numpy(real))
    for count in (1, 3):
        made = torch.from_numpy(winners(job, count))
        assert figures(results)["fid-mean-colour", 0, count] == pytest.approx(
            frechet_distance(moments, Moments.of(made)), rel=1e-4)
        assert figures(results)["is-mean-colour", 0, count] == pytest.approx(
            inception_score(made @ torch.arange(12.0).view(3, 4))[0], rel=1e-6)


def test_a_row_carries_its_protocol(job, evaluate):
    results, _ = evaluate(job, options={"guidance": 2.0}, blur=(0.0, 1.0))
    row = next(row for row in results.rows if row.place == ("fid", 1, 3))
    own = row.protocol
    assert (own.samples, own.candidates, own.ranker, own.ranker_digest) == (20, 3, "redness", "11")
    assert (own.extractor, own.extractor_digest, own.resize, own.blur) == ("mean-colour", "22", "none", 1.0)
    assert (own.step, own.weights, own.settings) == (7, "EMA", "temperature 1.0, guidance 2.0")
    assert own.references == 24 and own.reference_fingerprint == own.captions_fingerprint
    assert "tessera" in own.tool and "torchmetrics" in own.tool
    first = next(row for row in results.rows if row.place == ("fid", 0, 1))
    assert first.protocol.ranker is None


def test_what_is_painted_is_kept_and_a_stop_loses_one_block(job, evaluate):
    whole, generator = evaluate(replace(job, out=job.out / "whole"))
    assert len(generator.painted) == 60

    class Stops(StubGenerator):
        def generate(self, captions, seeds, **options):
            if len(self.painted) >= 24:
                raise KeyboardInterrupt
            return super().generate(captions, seeds, **options)

    with pytest.raises(KeyboardInterrupt):
        evaluate(job, Stops())
    again, generator = evaluate(job)
    assert len(generator.painted) == 60 - 24
    assert figures(again) == figures(whole)
    _, generator = evaluate(job, metrics=("kid",))
    assert generator.painted == []


def test_kill_9_loses_one_block(job, evaluate, split):
    whole, _ = evaluate(replace(job, out=job.out / "whole"))
    out = job.out / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("worker.py")), split, str(out),
                                str(job.cache)], env=environment)
    deadline = time.monotonic() + 120
    while len(list(out.glob("pictures-*/block_*.npz"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(out.glob("pictures-*/block_*.npz")))
    assert 3 <= done < 10
    again, generator = evaluate(job, out=out)
    assert len(generator.painted) == 60 - 6 * done
    assert figures(again) == figures(whole)


def test_another_seed_ranker_or_option_paints_anew(job, evaluate):
    evaluate(job)
    for change in ({"seed": 1}, {"options": {"guidance": 2.0}}, {"samples": 18}, {"candidates": (1, 2)}):
        _, generator = evaluate(job, **change)
        assert generator.painted, change


def test_real_features_are_kept_for_the_next_evaluation(job, evaluate):
    evaluate(job)
    before = {path: path.stat().st_mtime_ns for path in job.cache.rglob("*.npz")}
    evaluate(replace(job, out=job.out / "other", seed=5))
    assert before and {path: path.stat().st_mtime_ns for path in job.cache.rglob("*.npz")} == before
    evaluate(replace(job, out=job.out / "third", reference_samples=10))
    assert len(list(job.cache.iterdir())) == 2


def test_a_damaged_block_is_named(job, evaluate):
    evaluate(job)
    block = next(job.out.glob("pictures-*/block_000003.npz"))
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(UserError, match=r"block_000003.npz cannot be read .*delete it"):
        evaluate(job, blur=(1.0,))


def test_unreadable_reference_pictures_are_counted_and_listed(job, evaluate, tmp_path):
    folder = tmp_path / "real"
    (folder / "deep").mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(colour=(20 * number, 9 * number**2 % 256, 7)))
    (folder / "deep" / "torn.png").write_bytes(png()[:40])
    (folder / "text.jpg").write_text("no picture")
    results, _ = evaluate(job, reference=str(folder), metrics=("fid",))
    assert [line.split(":")[0] for line in results.unreadable] == ["deep/torn.png", "text.jpg"]
    assert all(row.protocol.references == 8 for row in results.rows)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither shards"):
        evaluate(job, reference=str(tmp_path / "empty"), metrics=("fid",))


def test_too_few_samples_are_refused_before_painting_or_marked(job, evaluate):
    generator = StubGenerator()
    with pytest.raises(UserError, match=r"needs at least 4 pictures .*--samples is 3, .* has 24 .*--allow-few"):
        evaluate(job, generator, samples=3, metrics=("fid",))
    assert not generator.painted
    results, _ = evaluate(job, samples=3, metrics=("fid",), allow_few=True)
    assert all(row.protocol.few_samples for row in results.rows)


def test_what_does_not_fit_the_model_is_left_out_with_the_reason(job, evaluate):
    results, _ = evaluate(job, metrics=("fid", "psnr"))
    assert "reconstructions" in results.left_out["psnr"] and {row.family for row in results.rows} == {"fid"}
    with pytest.raises(UserError, match="nothing is left to measure: ssim"):
        evaluate(job, metrics=("ssim",))


@pytest.mark.parametrize(("change", "message"), [
    ({"metrics": ("fid", "fud")}, "'fud' cannot be measured; known: fid"),
    ({"metrics": ()}, "nothing cannot be measured"),
    ({"samples": 1}, "at least 2"),
    ({"reference_samples": 0}, "--reference-samples 0"),
    ({"candidates": (1, 0)}, "from 1"),
    ({"candidates": (2, 2)}, "different"),
    ({"rerank": None}, "--candidates 3 needs --rerank"),
    ({"blur": (-1.0,)}, "none below 0"),
    ({"samples": 9}, "at least 10 samples"),
])
def test_mistakes_are_named(job, change, message):
    with pytest.raises(UserError, match=message):
        check(replace(job, **change))


def test_missing_models_are_named(job, evaluate):
    with pytest.raises(UserError, match="--vs-model"):
        evaluate(job, metrics=("vs",))
    with pytest.raises(UserError, match="--judge-clip"):
        evaluate(job, metrics=("clip",), rerank=None, candidates=(1,))
    with pytest.raises(UserError, match="holds 2.. different captions, --samples 100000"):
        evaluate(job, samples=100000)


def test_captions_that_are_not_read_whole_are_counted():
    said = []
    tell_lost(["short", "rather long", "very long"], [Reds(), Redness()], said.append)
    assert said == ["not read whole: 2 captions of 3, such as: 'rather long' is cut"]


class Reds:
    """A VS scorer, and a CLIP of two features: how red a picture is, how long a caption."""

    def __init__(self, digest: str = "33"):
        self.identity = {"kind": "clip", "path": "reds", "digest": digest}

    def caption_warnings(self, captions):
        return [f"{caption!r} is cut" for caption in captions if len(caption) > 6]

    def cosines(self, images, captions):
        return images[:, 0].float().mean(dim=(1, 2)) / 255 + torch.tensor([len(caption) for caption in captions]) / 100

    def encode_image(self, images):
        red = images[:, 0].float().mean(dim=(1, 2)) / 255
        return torch.stack([red, (1 - red**2).sqrt()], dim=1)

    def encode_captions(self, captions):
        return torch.tensor([[1.0, 0.0]]).expand(len(captions), 2)


def test_vs_similarity_is_that_of_each_picture_and_its_own_caption(job, evaluate, monkeypatch):
    monkeypatch.setattr("dalle.evaluation.measure.named_vs", lambda job: (Reds(), "reds", "33"))
    results, _ = evaluate(job, metrics=("vs",))
    drawn, _ = draw_captions(ShardIndex.load(job.data), job.samples, job.seed)
    lengths = np.array([len(one.caption) for one in drawn]) / 100
    for count in (1, 3):
        row = next(row for row in results.rows if row.place == ("vs", 0, count))
        cosines = winners(job, count)[:, 0] + lengths
        assert (row.value, row.error) == (pytest.approx(cosines.mean()), pytest.approx(cosines.std()))
        assert (row.metric, row.protocol.judge_digest) == ("vs-reds", "33")


@pytest.mark.parametrize(("digest", "judged"), [("33", {1, 3}), ("11", {1})])
def test_a_clip_judges_only_what_it_has_not_chosen(job, evaluate, monkeypatch, digest, judged):
    monkeypatch.setattr("dalle.evaluation.measure.load_reranker", lambda spec, device: Reds(digest))
    results, _ = evaluate(job, metrics=("clip",), judge_clip="reds")
    assert {row.protocol.candidates for row in results.rows} == judged
    for row in results.rows:
        assert row.value == pytest.approx(100 * winners(job, row.protocol.candidates)[:, 0].mean(), rel=1e-5)
    assert ("clip of the best of several" in results.left_out) == (digest == "11")
