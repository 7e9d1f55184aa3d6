"""One evaluation from the model to its rows: captions, pictures, features, figures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.data.index import ShardIndex
from dalle.data.shapes.grammar import parse_caption
from dalle.errors import UserError
from dalle.evaluation.blocks import BlockStore
from dalle.evaluation.captions import draw_captions, shuffled_positions
from dalle.evaluation.diversity import classes_of, same_class_pairs, similarity_of_painted, similarity_of_real
from dalle.evaluation.extraction import (
    chosen,
    extract,
    extract_cosines,
    extract_pairs,
    extract_reference,
    left_out_of,
)
from dalle.evaluation.figures import CHOICES, distribution_rows, diversity_rows, judge_rows, score_rows, vs_row
from dalle.evaluation.job import DISTRIBUTION, OF_CAPTIONS, OF_CODECS, Job, Results, check
from dalle.evaluation.pictures import PaintedCaptions, Reconstructed
from dalle.evaluation.processes import Processes
from dalle.evaluation.protocol import Protocol, Row
from dalle.evaluation.references import References, ShardReferences, open_references
from dalle.evaluation.sources import PROTOCOL as EDITS
from dalle.evaluation.sources import Sources
from dalle.files import file_digest
from dalle.metrics.distributions import Moments
from dalle.metrics.features import FeatureExtractor, load_extractor, run_name
from dalle.metrics.judge_report import judge_report
from dalle.metrics.retrieval import mean_and_error
from dalle.metrics.vs import load_vs
from dalle.models.base import WEIGHTS_FILE
from dalle.models.clip import ClipModel
from dalle.sampling.rerank import Reranker, load_reranker
from dalle.store import (
    CODECS,
    RERANKERS,
    Generator,
    Origin,
    find_model,
    identify,
    load_codec,
    load_generator,
    model_folder,
    model_kind,
    origin_of,
)

Say = Callable[[str], None]


def evaluate(job: Job, processes: Processes, say: Say) -> Results | None:
    """The results on rank 0, None elsewhere. What was painted and extracted is kept below ``job.out``."""
    check(job)
    folder = model_folder(job.model)
    if model_kind(folder) in CODECS:
        results = evaluate_codec(job, folder, processes, say)
    else:
        generator = load_generator(job.model, job.device, torch.bfloat16 if job.precision == "bf16" else torch.float32)
        reranker = load_reranker(job.rerank, job.device) if max(job.candidates) > 1 else None
        results = evaluate_generator(job, generator, reranker, origin_of(folder), processes, say)
    families = list(dict.fromkeys(row.family for row in results.rows))
    results.rows.sort(key=lambda row: families.index(row.family))
    return results if processes.is_rank0 else None


# -- generators -------------------------------------------------------------------------------------------------------

def evaluate_generator(job: Job, generator: Generator, reranker: Reranker | None, origin: Origin,
                       processes: Processes, say: Say) -> Results:
    """Any model behind the Generator interface; the rows are on rank 0."""
    kind, results = generator.identity["kind"], Results(generator.identity)
    metrics = left_out(results, job.metrics, OF_CODECS, f"measures reconstructions; a {kind} makes none", say)
    index = ShardIndex.load(job.data)
    drawn, bad = draw_captions(index, job.samples, job.seed)
    results.unreadable_captions = dict(bad)
    captions = [one.caption for one in drawn]
    if "judge" in metrics and not in_grammar(captions):
        metrics = left_out(results, metrics, ("judge",), f"reads captions of shapes; {job.data} has others", say)

    # Everything is loaded before the first picture is painted: a wrong path must not wait for the last one.
    extractor = references = clip = vs = None
    if any(metric in metrics for metric in DISTRIBUTION):
        extractor = load_extractor(extractor_spec(job), job.device)
        references = ShardReferences(job.data, index) if job.reference is None else open_references(job.reference)
        metrics = fitting(job, metrics, extractor, references, results, say)
    if "clip" in metrics or "rprecision" in metrics:
        clip = load_reranker(judge_spec(job, metrics), job.device)
    if "vs" in metrics:
        vs, vs_name, vs_digest = named_vs(job)
    if "msssim" in metrics:
        alike = same_class_pairs(classes_of(index, drawn), job.seed)
        if len(alike) < 2:
            metrics = left_out(results, metrics, ("msssim",), "compares pictures of one class; the samples drawn from "
                               f"{job.data} share no class_id", say)
    refuse_nothing(metrics, results)
    tell_lost(captions, [reader for reader in (generator, reranker, clip) if reader is not None], say)

    sources = Sources(ShardReferences(job.data, index), drawn, job.seed) if generator.edits else None
    base = Protocol(
        tool=tool(), samples=job.samples, seed=job.seed, image_size=generator.image_size, captions=job.data,
        captions_fingerprint=index.fingerprint, sources=EDITS if sources is not None else None,
        settings=listed(generator.settings(**job.options)), step=origin.step, weights=origin.weights,
        precision=generator.precision)
    ranker = {} if reranker is None else {"ranker": name_of(job.rerank, reranker.identity),
                                          "ranker_digest": reranker.identity.get("digest")}
    protocols = [replace(base, candidates=count, **(ranker if count > 1 else {})) for count in job.candidates]
    painted = PaintedCaptions(job.out, drawn, job.candidates, generator, reranker, job.seed, job.options, {
        "model": what_it_is(generator.identity), "ranker": what_it_is(reranker.identity) if reranker else None,
        "precision": generator.precision}, sources)
    painted.paint(processes)

    if extractor is not None:
        for blur in job.blur:
            real = extract_reference(job.cache, references, job.reference_samples, generator.image_size, extractor,
                                     blur, processes)
            made = extract(job.out, painted.digest, painted.store.count, painted.images, extractor, blur, processes,
                           "the pictures")
            if processes.is_rank0:
                results.unreadable = left_out_of(real)
                truth = torch.from_numpy(real.all("features"))
                moments = Moments.of(truth)
                for column, protocol in enumerate(protocols):
                    own = against(replace(protocol, blur=blur), references)
                    results.rows += distribution_rows(metrics, rows_of(made, painted.slots(column)), truth, moments,
                                                      extractor, own, job.allow_few)
    if clip is not None:
        pairs = extract_pairs(job.out, painted, clip, processes)
        if processes.is_rank0:
            add_scores(results, job, metrics, painted, pairs, protocols, clip.identity,
                       reranker.identity if reranker else None, say)
    if vs is not None:
        cosines = extract_cosines(job.out, painted, vs, vs_digest, processes)
        if processes.is_rank0:
            for column, protocol in enumerate(protocols):
                values = torch.from_numpy(chosen(cosines, "cosines", painted.slots(column)))
                results.rows.append(vs_row(values, replace(protocol, judge=vs_name, judge_digest=vs_digest)))
    if "msssim" in metrics and processes.is_rank0:
        real = similarity_of_real(ShardReferences(job.data, index), drawn, alike, generator.image_size)
        for column, protocol in enumerate(protocols):
            made = similarity_of_painted(painted.store, painted.slots(column), alike)
            results.rows += diversity_rows(made, real, generator.image_size, protocol)
    if "judge" in metrics and processes.is_rank0:
        for column, protocol in enumerate(protocols):
            images = chosen(painted.store, "images", painted.slots(column))
            results.judge[protocol.candidates] = judge_report(images, captions)
            results.rows += judge_rows(results.judge[protocol.candidates], protocol)
    return results


def add_scores(results: Results, job: Job, metrics: Sequence[str], painted: PaintedCaptions, pairs: BlockStore,
               protocols: Sequence[Protocol], clip: dict[str, Any], ranker: dict[str, Any] | None, say: Say) -> None:
    """CLIP score and R-precision; a CLIP does not judge what it has chosen itself."""
    name = name_of(judge_spec(job, metrics), clip)
    itself = ranker is not None and what_it_is(ranker) == what_it_is(clip)
    texts = torch.from_numpy(pairs.all("captions"))
    for column, protocol in enumerate(protocols):
        if itself and protocol.candidates > 1:
            continue
        images = torch.from_numpy(chosen(pairs, "images", painted.slots(column)))
        results.rows += score_rows(metrics, images, texts, painted.captions,
                                   replace(protocol, judge=name, judge_digest=clip.get("digest")))
    if itself:
        for metric in ("clip", "rprecision"):
            if metric in metrics:
                results.leave_out(f"{metric} of the best of several",
                                  f"{name} chose them and cannot judge them: give another --judge-clip", say)


def in_grammar(captions: Sequence[str]) -> bool:
    """Whether the shapes judge can read them."""
    try:
        for caption in captions:
            parse_caption(caption)
    except ValueError:
        return False
    return True


# -- codecs -----------------------------------------------------------------------------------------------------------

def evaluate_codec(job: Job, folder: Path, processes: Processes, say: Say) -> Results:
    """Reconstructions against their originals; FID and KID are then rFID and rKID."""
    identity, origin = identify(folder), origin_of(folder)
    results = Results(identity)
    metrics = left_out(results, job.metrics, OF_CAPTIONS, f"needs captions; a {identity['kind']} reads none", say)
    codec = load_codec(folder, job.device)
    references = open_references(job.reference or job.data)
    if job.samples > len(references):
        raise UserError(f"--samples {job.samples}: {references.name} holds {len(references)} pictures; "
                        f"ask for at most {len(references)}")
    extractor = None
    if any(metric in metrics for metric in DISTRIBUTION):
        extractor = load_extractor(extractor_spec(job), job.device)
        metrics = fitting(job, metrics, extractor, references, results, say)
    refuse_nothing(metrics, results)

    numbers = sorted(shuffled_positions(len(references), job.seed)[:job.samples])
    made = Reconstructed(job.out, references, numbers, codec, {"model": what_it_is(identity)})
    made.paint(processes)
    sources = {"originals": made.originals, "reconstructions": made.images}
    features = {blur: {what: extract(job.out, f"{made.digest} {what}", made.store.count, images, extractor, blur,
                                     processes, f"the {what}") for what, images in sources.items()}
                for blur in job.blur if extractor is not None}
    if not processes.is_rank0:
        return results
    results.unreadable = left_out_of(made.store)
    count = len(made.store.all("numbers"))
    if count < 2:
        raise UserError(f"{references.name}: of {len(numbers)} pictures {count} can be read ({results.unreadable[0]})")
    base = against(Protocol(
        tool=tool(), samples=count, seed=job.seed, image_size=codec.config.image_size, references=count,
        step=origin.step, weights=origin.weights, precision="fp32"), references)
    for metric in OF_CODECS:
        if metric in metrics:
            results.rows.append(Row(metric, metric, *mean_and_error(torch.from_numpy(made.store.all(metric))), replace(
                base, detail="8-bit pictures, mean over pictures, ± standard error")))
    for blur, stores in features.items():
        truth = torch.from_numpy(stores["originals"].all("features"))
        whole = [np.arange(len(arrays["features"])) for arrays in stores["reconstructions"].blocks()]
        results.rows += distribution_rows(metrics, rows_of(stores["reconstructions"], whole), truth, None, extractor,
                                          replace(base, blur=blur), job.allow_few, prefix="r")
    return results


# -- what both need ---------------------------------------------------------------------------------------------------

def tell_lost(captions: list[str], readers: Sequence[Generator | Reranker], say: Say) -> None:
    """Say of how many captions a model does not get to read everything, with the first of them."""
    for reader in readers:
        lines = reader.caption_warnings(captions)
        if lines:
            say(f"not read whole: {len(lines)} captions of {len(captions)}, such as: {lines[0]}")


def left_out(results: Results, metrics: Sequence[str], some: Sequence[str], reason: str, say: Say) -> list[str]:
    """``metrics`` without ``some``, which are noted with the reason."""
    for metric in metrics:
        if metric in some:
            results.leave_out(metric, reason, say)
    return [metric for metric in metrics if metric not in some]


def refuse_nothing(metrics: Sequence[str], results: Results) -> None:
    if not metrics:
        reasons = "; ".join(f"{metric} {reason}" for metric, reason in results.left_out.items())
        raise UserError(f"nothing is left to measure: {reasons}")


def extractor_spec(job: Job) -> str:
    """``--extractor``, or else a CLIP of ours that was named anyway."""
    if job.extractor is not None:
        return job.extractor
    for spec in (job.judge_clip, job.rerank):
        folder = find_model(spec) if spec is not None else None
        if folder is not None and model_kind(folder) == ClipModel.model_type:
            return f"clip:{spec}"
    raise UserError("fid, kid and is need --extractor: inception:FILE (what papers report), open_clip:NAME/TAG, or, "
                    "without any download, clip:RUN, a CLIP that was trained here")


def judge_spec(job: Job, metrics: Sequence[str]) -> str:
    spec = job.judge_clip or job.rerank
    if spec is None:
        raise UserError("clip and rprecision need --judge-clip: a CLIP run of ours or open_clip:NAME/TAG")
    if "rprecision" in metrics and job.samples < CHOICES and not job.allow_few:
        raise UserError(f"rprecision chooses among {CHOICES} captions and needs as many samples, not {job.samples}: "
                        "measure more, or pass --allow-few and the row will say so")
    return spec


def named_vs(job: Job) -> tuple[Any, str, str]:
    if job.vs_model is None:
        raise UserError("vs needs --vs-model: the run folder of a VS model "
                        "(launch/train.py configs/quickstart/vs.yaml makes one)")
    folder = model_folder(job.vs_model)
    return load_vs(folder, job.device), run_name(folder), file_digest(folder / WEIGHTS_FILE)


def fitting(job: Job, metrics: list[str], extractor: FeatureExtractor, references: References, results: Results,
            say: Say) -> list[str]:
    """Refuse too few pictures before any is painted; leave the Inception Score out where there are no classes."""
    real = min(len(references), job.reference_samples or len(references))
    enough = extractor.dim + 1
    if "fid" in metrics and min(job.samples, real) < enough and not job.allow_few:
        raise UserError(f"fid over {extractor.dim} features needs at least {enough} pictures of either kind for a "
                        f"covariance; --samples is {job.samples}, {references.name} has {real} real ones: measure "
                        "more, or pass --allow-few and the row will say so")
    if "is" in metrics and extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[1] is None:
        return left_out(results, metrics, ("is",), f"needs an extractor with classes; {extractor.name} has none, "
                        "inception:FILE has", say)
    return metrics


def against(protocol: Protocol, references: References) -> Protocol:
    return replace(protocol, reference=references.name, reference_fingerprint=references.fingerprint)


def rows_of(store: BlockStore, slots: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """What a picture was turned into, one row for each caption."""
    names = store.read(0).keys() & {"features", "logits"}
    return {name: torch.from_numpy(chosen(store, name, slots)) for name in names}


def name_of(spec: str | None, identity: dict[str, Any]) -> str:
    """A CLIP's name for the row: of a run of ours by its kind and run, of others as they were given."""
    if identity.get("kind") in RERANKERS and spec is not None:
        return f"{identity['kind']}:{run_name(model_folder(spec))}"
    return str(identity.get("path", identity.get("kind")))


def what_it_is(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the place where the weights lie."""
    return {key: value for key, value in identity.items() if key != "path" or "digest" not in identity}


def listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {'off' if value is None else value}"
                     for name, value in settings.items())


def tool() -> str:
    return f"tessera {version('tessera-t2i')}, torchmetrics {version('torchmetrics')}"
