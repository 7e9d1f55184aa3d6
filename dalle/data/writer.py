"""Write shards in the layout of img2dataset: KEY.jpg|png|webp, KEY.txt, optional KEY.json, in numbered tars."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import webdataset

from dalle.data.index import ShardIndex
from dalle.data.members import IMAGE_EXTENSIONS
from dalle.errors import UserError
from dalle.words import one_line


class ShardWriter:
    """Samples to ``FOLDER/00000.tar``, ``00001.tar``, ...; the same samples give the same bytes.

    A shard is written beside its place and renamed when full; :meth:`close` adds the index. A folder that already holds
    shards is refused, so that two data sets cannot mix.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000):
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.folder = Path(folder).absolute()
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self._digits = max(4, len(str(samples_per_shard - 1)))
        self._count = 0               # samples in the open shard
        self._file: BinaryIO | None = None
        self._tar: webdataset.TarWriter | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {self.folder} cannot be made: {error.strerror}; check the path") from None
        if next(self.folder.glob("*.tar"), None):
            raise UserError(f"{self.folder} already holds .tar shards; give an empty folder or delete them")

    def write(self, image: bytes, extension: str, captions: list[str], meta: dict[str, Any] | None = None) -> str:
        """Add one sample and return its key (shard digits, then index in the shard). Line breaks in captions go."""
        extension = extension.lower().removeprefix(".")
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"the picture's extension is {extension!r}; known: {', '.join(IMAGE_EXTENSIONS)}")
        if self._tar is None or self._count == self.samples_per_shard:
            self._finish_shard()
            self._start_shard()
        key = f"{len(self.paths):05d}{self._count:0{self._digits}d}"
        text = "\n".join(map(one_line, captions))
        sample: dict[str, Any] = {"__key__": key, extension: image, "txt": text.encode("utf-8")}
        if meta is not None:
            sample["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode("utf-8")
        try:
            self._tar.write(sample)
        except OSError as error:
            raise UserError(f"a shard in {self.folder} cannot be written: {error.strerror}") from None
        self._count += 1
        return key

    def close(self) -> ShardIndex:
        """Finish the last shard, write the index and return it."""
        self._finish_shard()
        index = ShardIndex.build(self.paths)
        index.save()
        return index

    def abort(self) -> None:
        """Drop the unfinished shard; finished ones stay, without an index."""
        if self._file is not None:
            self._tar.close()         # before its file: a tar stream flushes when it is collected
            self._file.close()
            os.unlink(self._file.name)
            self._file = self._tar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _start_shard(self) -> None:
        draft = self.folder / f".{len(self.paths):05d}.tar.part"
        try:
            self._file = open(draft, "wb")  # noqa: SIM115 - it stays open until the shard is full
        except OSError as error:
            raise UserError(f"{draft} cannot be written: {error.strerror}; check the permissions") from None
        self._tar = webdataset.TarWriter(self._file, user="tessera", group="tessera", mtime=0, encoder=False)
        self._count = 0

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        path = self.folder / f"{len(self.paths):05d}.tar"
        os.replace(self._file.name, path)
        self.paths.append(path)
        self._file = self._tar = None
