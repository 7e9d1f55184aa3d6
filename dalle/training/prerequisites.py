"""What a run reads and does not make itself: other runs, which can be trained first, and data sets."""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dalle.config import load_config, read_yaml
from dalle.data.codes import codes_digest
from dalle.data.index import check_shards
from dalle.data.opening import refuse_absent, shard_urls
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import MissingModel, UserError
from dalle.store import EXPORT_FOLDER
from dalle.training.run import RunConfig
from dalle.training.run_folder import finished_steps
from dalle.training.signals import run_to_its_end

SECONDS_BETWEEN_LOOKS = 1.0      # of the processes that wait while the main one trains
# what tells a process that it is one of several; a prerequisite is trained by one alone
OF_A_GROUP = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
                        r"|(TORCHELASTIC|ACCELERATE|FSDP|SLURM|OMPI|PMI|PMIX)_.*")

# data set -> how its pictures and its tokenizer are made; {root} is its folder
RECIPES = {
    "shapes": ("python tools/make_shards.py shapes --out {root}",
               "python tools/train_tokenizer.py {root}/train --out {root}/tokenizer --vocab-size 512"),
    "emoji": ("python tools/make_shards.py emoji --out {root} --install",
              "python tools/train_tokenizer.py {root}/train --out {root}/tokenizer --vocab-size 4096"),
}

# keys of `data` that follow from the model, so that a run and its prerequisites may well differ in them
OF_THE_MODEL = {"image_size", "crop", "flip", "images", "caption", "num_captions", "text_length", "bpe_dropout",
                "caption_dropout", "codes", "validation_codes"}

State = Literal["finished", "unfinished", "missing"]


class Prerequisite(NamedTuple):
    """A run that another one reads."""

    path: str            # of its config, as it was given
    config: RunConfig
    overrides: tuple[str, ...] = ()      # of the run that reads it, as far as they are passed on

    @property
    def state(self) -> State:
        """How far it is; a model without checkpoints was brought from elsewhere and counts as finished."""
        folder = self.config.folder
        exported = (folder / EXPORT_FOLDER / "config.json").is_file()
        if not (folder / "checkpoints").is_dir():
            return "finished" if exported else "missing"
        return "finished" if exported and finished_steps(folder) >= self.config.train.steps else "unfinished"

    @property
    def command(self) -> str:
        """What a person types to train it."""
        return shlex.join(["python", "launch/train.py", self.path, *self.overrides])

    def describe(self) -> dict[str, str]:
        return {"config": self.path, "folder": str(self.config.folder), "state": self.state, "command": self.command}


def prerequisites(path: str, config: RunConfig, runs: Mapping[str, type[RunConfig]],
                  overrides: Sequence[str] = ()) -> list[Prerequisite]:
    """Every run that ``config``, read from ``path``, needs, each once and after all that it needs itself.

    ``overrides`` are those of ``config``; :func:`passed_on` says which of them hold for the others, too.
    """
    found: dict[Path, Prerequisite] = {}

    def visit(above: list[str], config: RunConfig) -> None:
        for name in config.prerequisites:
            if Path(name).resolve() in {Path(other).resolve() for other in above}:
                raise UserError(f"prerequisites go round in a circle: {' needs '.join([*above, name])}")
            if Path(name).resolve() in found:
                continue
            try:
                own = load_config(name, [], runs)
                passed = passed_on(overrides, own)
                own = load_config(name, passed, runs) if passed else own
            except UserError as error:
                raise UserError(f"prerequisites of {above[-1]}: {error}") from None
            visit([*above, name], own)
            found[Path(name).resolve()] = Prerequisite(name, own, passed)

    visit([path], config)
    return list(found.values())


def passed_on(overrides: Sequence[str], prerequisite: RunConfig) -> tuple[str, ...]:
    """The overrides that a run and what it reads have in common: where the pictures and captions are and how they are
    read (``data.*`` but ``OF_THE_MODEL``), and the tokenizer of a data set where the prerequisite has one."""
    return tuple(override for override in overrides if is_shared(*override.partition("=")[::2], prerequisite))


def is_shared(key: str, value: str, prerequisite: RunConfig) -> bool:
    section, dot, name = key.partition(".")
    if section != "data" or not dot:
        return False
    if name == "tokenizer":      # one in a run's folder is that run's own
        return prerequisite.data.tokenizer is not None and Path(value).parent.name != EXPORT_FOLDER
    return name not in OF_THE_MODEL


def train_prerequisites(needed: Sequence[Prerequisite], command: Sequence[str], is_rank0: bool,
                        say: Callable[[str], None]) -> int:
    """Train what is missing or unfinished, in order, each by ``command`` and its config; the first status but 0, or 0.

    Of several processes the main one does it and the others wait; where it fails, their launcher ends them.
    """
    for one in needed:
        if not is_rank0:
            while one.state != "finished":
                time.sleep(SECONDS_BETWEEN_LOOKS)
        elif one.state != "finished":
            say(f"prerequisite: {one.config.folder} is {one.state}, training it first "
                f"({one.command})")
            alone = {name: value for name, value in os.environ.items() if not OF_A_GROUP.fullmatch(name)}
            status = run_to_its_end([*command, one.path, *one.overrides], alone)
            if status:
                say(f"the prerequisite {one.path} ended with status {status}; nothing after it was started")
                return status
            if one.state != "finished":
                raise UserError(f"{one.path} ended well, but {one.config.folder} is {one.state}: is anything else "
                                "writing there?")
    return 0


@contextmanager
def missing_runs_explained(path: str, needed: Callable[[], Sequence[Prerequisite]]) -> Iterator[None]:
    """Add to the error about a run that does not exist how to make it, where a config of it is known."""
    try:
        yield
    except UserError as error:
        missing = missing_model(error)
        advice = how_to_make(missing, path, needed()) if missing is not None else None
        if advice is None:
            raise
        raise UserError(f"{error}; make it first: {advice}") from error


def missing_model(error: BaseException | None) -> Path | None:
    """Where the model should be whose absence is behind ``error``."""
    while error is not None:
        if isinstance(error, MissingModel):
            return Path(error.path)
        error = error.__cause__ or error.__context__
    return None


def how_to_make(folder: Path, path: str, needed: Sequence[Prerequisite]) -> str | None:
    """The command for the run in ``folder``: of a prerequisite, or of a config beside the one at ``path``."""
    for one in needed:
        if is_inside(folder, one.config.folder):
            return f"{one.command}, or add --with-prerequisites"
    for other in sorted(Path(path).parent.glob("*.yaml")):
        if is_inside(folder, folder_of(other)):
            return f"python launch/train.py {other}"
    return None


def folder_of(path: Path) -> Path | None:
    """The run's folder, by a config that is not validated."""
    try:
        tree: dict[str, Any] = read_yaml(path)
        return Path(tree.get("output", "runs")) / tree["name"]
    except (UserError, KeyError, TypeError):
        return None


def is_inside(folder: Path, run: Path | None) -> bool:
    return run is not None and run.absolute() in (folder.absolute(), *folder.absolute().parents)


def check_data(data: DataConfig) -> None:
    """:class:`UserError` for what ``data`` names and is not there, as far as it shows without reading shards; with the
    command that makes it, where it is of a data set of the project."""
    checks = {key: check for key, check in data_checks(data).items() if getattr(data, key) is not None}
    for key in checks:
        refuse_not_made(key, getattr(data, key))
    for key, check in checks.items():
        try:
            check(getattr(data, key))
        except UserError as error:
            advice = "; or set data.validation=null to measure nothing" if key == "validation" else ""
            raise UserError(f"data.{key}: {error}{advice}") from error


def data_checks(data: DataConfig) -> dict[str, Callable[[str], object]]:
    """Key of ``data`` -> what finds out whether that which it names is there. Validation is always exact."""
    exact = partial(check_shards, bad_shards=data.bad_shards)
    return {"train": exact if data.tier == "exact" else lambda spec: refuse_absent(
                spec, shard_urls(spec, data.allow_pipe), data.bad_shards),
            "validation": exact, "tokenizer": CaptionTokenizer.load, "codes": codes_digest,
            "validation_codes": codes_digest}


def refuse_not_made(key: str, named: str) -> None:
    """:class:`UserError` with the command for a part of a data set of the project that was not made yet."""
    for place in named.split("::"):
        match = re.match(rf"((?:.*/)?data/({'|'.join(RECIPES)}))/([^/*?\[{{]+)", place)
        if match and not Path(match[1], match[3]).exists():
            made_by = RECIPES[match[2]][key == "tokenizer"].format(root=match[1])
            raise UserError(f"data.{key}: {match[1]}/{match[3]} does not exist; make it first: {made_by}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
