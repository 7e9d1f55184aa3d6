#!/usr/bin/env python
"""Measure a generator or a codec under one stated protocol, or compare what was measured.

    python launch/evaluate.py --model runs/quickstart/transformer --data data/shapes/validation --samples 512 \\
        --metrics fid,kid,clip,rprecision,judge --rerank runs/quickstart/clip --candidates 1,4,16 \\
        --judge-clip runs/quickstart/clip_judge --out runs/quickstart/evaluation
    accelerate launch --num_processes 8 launch/evaluate.py ...
    python launch/evaluate.py --model runs/quickstart/dvae --data data/shapes/validation --samples 1000 \\
        --metrics psnr,ssim,fid --extractor clip:runs/quickstart/clip
    python launch/evaluate.py --compare A/results.json B/results.json

Pictures and features are kept in --out: a run that was stopped goes on where it was when started again. Writes
results.json, results.md and plots (PNG); each figure carries its whole protocol.
"""

import argparse
import os
import sys
from pathlib import Path

import gans
from dalle.errors import UserError, run_command

DEFAULT_CACHE = Path("runs/reference_features")
SHOWN = 10      # of the unreadable pictures; results.json lists more


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="RUN|FOLDER", help="a run or an exported model: generator or codec")
    parser.add_argument("--data", metavar="SHARDS", help="the held-out split: captions and, without --reference, "
                        "the real pictures")
    parser.add_argument("--metrics", default="fid,kid", metavar="A,B",
                        help="of fid, kid, is, clip, rprecision, vs, judge, msssim; for codecs fid, kid, is, psnr, "
                        "ssim (default: %(default)s)")
    parser.add_argument("--samples", type=whole, default=30000, help="captions, each drawn once (default: %(default)s)")
    parser.add_argument("--extractor", metavar="SPEC", help="what fid, kid and is look through: inception:FILE, "
                        "inception-torchvision:FILE, open_clip:NAME/TAG, clip:RUN (default: clip: of the named CLIP)")
    parser.add_argument("--rerank", metavar="CLIP", help="a CLIP run or open_clip:NAME/TAG that chooses the best of N")
    parser.add_argument("--candidates", type=numbers(whole), default=(1,), metavar="1,2,4",
                        help="the Ns; the most are painted once, each N takes the first of them (default: 1)")
    parser.add_argument("--judge-clip", metavar="CLIP", help="for clip and rprecision, another than --rerank")
    parser.add_argument("--vs-model", metavar="RUN", help="for vs: a run of the task vs")
    parser.add_argument("--reference", metavar="SHARDS|FOLDER", help="other real pictures: shards or a picture folder")
    parser.add_argument("--reference-samples", type=whole, help="take so many of them, always the same (default: all)")
    parser.add_argument("--blur", type=numbers(float), default=(0.0,), metavar="0,1,2,4,8",
                        help="radii in pixels for fid and is, of both sets (default: 0)")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--top-k", type=whole)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--truncation", type=float, help="of a GAN's noise")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--allow-few", action="store_true", help="measure with fewer samples than the metric needs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on a GPU")
    parser.add_argument("--out", type=Path, help="default: evaluation/ in the model's folder")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE,
                        help="features of real pictures, for all evaluations (default: %(default)s)")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="RESULTS.json", help="print one table, and stop")
    return parser


def whole(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def numbers(kind):
    """Several of ``kind``, separated by commas."""
    def read(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas") from None
    return read


def choose_device(name: str) -> str:
    """``auto`` is this process's GPU, if there is one."""
    import torch

    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return name


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.compare:
        from dalle.evaluation.report import compare

        print(compare(arguments.compare), end="")
        return
    for name in ("model", "data"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing: --model RUN --data VALIDATION_SHARDS, or --compare A.json B.json")
    from dalle.training.engines.slurm import adopt_slurm

    gans.register()
    adopt_slurm()
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from dalle.evaluation.measure import Job, evaluate
    from dalle.evaluation.processes import Processes
    from dalle.evaluation.report import check_out, glance, write_report

    device = choose_device(arguments.device)
    names = ("temperature", "guidance", "top_k", "top_p", "truncation")
    job = Job(
        model=arguments.model, data=arguments.data, out=arguments.out or Path(arguments.model) / "evaluation",
        cache=arguments.cache, metrics=tuple(name.strip() for name in arguments.metrics.split(",") if name.strip()),
        samples=arguments.samples, candidates=arguments.candidates, rerank=arguments.rerank,
        judge_clip=arguments.judge_clip, extractor=arguments.extractor, vs_model=arguments.vs_model,
        reference=arguments.reference, reference_samples=arguments.reference_samples, blur=arguments.blur,
        options={name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
        seed=arguments.seed, allow_few=arguments.allow_few, device=device,
        precision="bf16" if arguments.dtype == "bf16" or (arguments.dtype == "auto" and device != "cpu") else "fp32")
    check_out(job.out)
    processes = Processes.from_environment()

    def say(message: str) -> None:
        if processes.is_rank0:
            print(message, file=sys.stderr, flush=True)

    results = evaluate(job, processes, say)
    if results is not None:
        written = write_report(results, job.out)
        print(glance(results.rows))
        for line in results.unreadable[:SHOWN]:
            say(f"not read: {line}")
        if results.unreadable:
            say(f"{len(results.unreadable)} real pictures could not be read and were left out")
        say(f"written: {', '.join(map(str, written))}")
    processes.close()


if __name__ == "__main__":
    run_command(main, save_memory="use --dtype bf16, fewer --candidates, or more processes")
