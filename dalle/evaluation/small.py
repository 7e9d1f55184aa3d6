"""A small evaluation while a model trains: the figures of ``launch/evaluate.py`` over fewer pictures, in memory."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dalle.data.damage import BadShards
from dalle.data.index import ShardIndex
from dalle.errors import UserError
from dalle.evaluation.captions import draw_captions, shuffled_positions
from dalle.evaluation.figures import distribution_rows, judge_rows, score_rows
from dalle.evaluation.measure import in_grammar, name_of, tool
from dalle.evaluation.protocol import Protocol, Row
from dalle.evaluation.references import ShardReferences, read_pictures
from dalle.evaluation.small_config import LEAST, SmallEvaluationConfig
from dalle.evaluation.sources import Sources
from dalle.metrics.distributions import IS_SPLITS
from dalle.metrics.features import FeatureExtractor, load_extractor
from dalle.metrics.judge_report import judge_report
from dalle.sampling.candidates import candidate_seed
from dalle.sampling.rerank import load_reranker
from dalle.store import Generator

BATCH = 64


class SmallEvaluation:
    """Call it with a generator for its figures; captions, seeds and real pictures are the same at every call.

    Everything that can be missing is looked for at once, before the training begins.
    """

    def __init__(self, config: SmallEvaluationConfig, validation: str | None, seed: int, device: torch.device | str,
                 bad_shards: BadShards = "refuse"):
        if validation is None:
            raise UserError("train.evaluate_every needs data.validation: the captions and pictures to measure with")
        self.config, self.seed, self.device = config, seed, torch.device(device)
        index = ShardIndex.load(validation, bad_shards)
        self.drawn = draw_captions(index, config.samples, seed)[0]
        self.captions = [one.caption for one in self.drawn]
        self.references = ShardReferences(validation, index)
        if "judge" in config.metrics and not in_grammar(self.captions):
            raise UserError(f"evaluation.metrics: judge reads captions of the shapes set; {validation} has others")
        self.extractor = self.clip = None
        if {"fid", "kid", "is"} & set(config.metrics):
            self.extractor = load_extractor(required(config.extractor, "extractor", "clip:RUN"), device)
            check_classes(config, self.extractor)
        if {"clip", "rprecision"} & set(config.metrics):
            self.clip = load_reranker(required(config.clip, "clip", "a CLIP run"), device)
        self._real: Tensor | None = None      # features, once they are asked for
        self._sources: Tensor | None = None   # pictures, once a generator edits

    def __call__(self, generator: Generator, came_forward: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Metric -> value, and ``samples``; ``came_forward()`` is called after each batch of pictures."""
        seeds = [candidate_seed(self.seed, prompt, 0) for prompt in range(len(self.captions))]
        parts = [slice(start, start + BATCH) for start in range(0, len(seeds), BATCH)]
        given = [{} for _ in parts]
        if generator.edits:
            pictures = self.sources(generator.image_size)
            given = [{"sources": pictures[part]} for part in parts]
        made = []
        for part, own in zip(parts, given, strict=True):
            made.append(generator.generate(self.captions[part], seeds[part], **own, **self.config.options))
            came_forward()
        images = torch.cat(made)
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():     # the trainer may have set bf16
            rows = self.rows(images)
        return {row.metric: row.value for row in rows} | {"samples": float(len(images))}

    def sources(self, size: int) -> Tensor:
        """uint8 [N, 3, size, size]: the pictures to change, the same at every call."""
        if self._sources is None:
            places = range(len(self.drawn))
            self._sources = Sources(self.references, self.drawn, self.seed).pictures(places, size)
        return self._sources

    def rows(self, images: Tensor) -> list[Row]:
        """The figures of uint8 [N, 3, S, S], the pictures of ``captions``."""
        rows: list[Row] = []
        protocol = Protocol(tool=tool(), samples=len(images), seed=self.seed, image_size=images.shape[-1], candidates=1)
        if self.extractor is not None:
            if self._real is None:
                self._real = self._real_features(images.shape[-1])
            made = dict(zip(("features", "logits"), self.extractor(images), strict=True))
            rows += distribution_rows(self.config.metrics, made, self._real, None, self.extractor, protocol,
                                      allow_few=True)
        if self.clip is not None:
            pictures = torch.cat([self.clip.encode_image(part).float().cpu() for part in images.split(BATCH)])
            texts = self.clip.encode_captions(self.captions).float().cpu()
            rows += score_rows(self.config.metrics, pictures, texts, self.captions,
                               replace(protocol, judge=name_of(self.config.clip, self.clip.identity)))
        if "judge" in self.config.metrics:
            rows += judge_rows(judge_report(images, self.captions), protocol)
        return rows

    def _real_features(self, size: int) -> Tensor:
        numbers = sorted(shuffled_positions(len(self.references), self.seed)[:self.config.references])
        pictures = [read_pictures(self.references, numbers[start:start + BATCH], size)[0]
                    for start in range(0, len(numbers), BATCH)]
        features = [self.extractor(part)[0] for part in pictures if len(part)]
        if sum(map(len, features)) < LEAST:
            raise UserError(f"{self.references.name}: fewer than {LEAST} of {len(numbers)} pictures can be read")
        return torch.cat(features)


def required(spec: str | None, name: str, example: str) -> str:
    if spec is None:
        raise UserError(f"evaluation.metrics needs evaluation.{name}: {example}, for example")
    return spec


def check_classes(config: SmallEvaluationConfig, extractor: FeatureExtractor) -> None:
    """What the Inception Score asks for."""
    if "is" not in config.metrics:
        return
    if extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[1] is None:
        raise UserError(f"evaluation.metrics: is needs an extractor with classes; {extractor.name} has none")
    if config.samples < IS_SPLITS:
        raise UserError(f"evaluation.metrics: is needs evaluation.samples of {IS_SPLITS} or more")
