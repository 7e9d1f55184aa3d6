"""A shard as a stream of bytes, from a path or a URL: read on where it broke off, and never waited for without end.

Schemes: a local path or ``file:``; ``http:`` and ``https:``; ``s3:`` and ``gs:`` by their own programs (``aws``,
``gsutil``), started without a shell; ``pipe:`` by a shell, and only where the user allowed it. webdataset's own openers
set no limit on a server's silence (it starts ``curl`` without one), and it has none for ``s3:``.
"""

import contextlib
import http.client
import logging
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from typing import Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from webdataset import utils as webdataset_utils
from webdataset.gopen import Pipe

from dalle.data.damage import SKIP, BadShards
from dalle.data.specs import expand_braces, glob_magic
from dalle.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 1 << 16
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0       # seconds between attempts: 1, 2, 4, ...
PASSING_STATUS = (408, 425, 429)             # and every 5xx
PROGRAMS = {"s3": ("aws", "s3", "cp", "--only-show-errors", "{url}", "-"), "gs": ("gsutil", "cat", "{url}")}
SCHEMES = ("file", "http", "https", *PROGRAMS, "pipe")


class LostShard(Exception):
    """A shard that cannot be had, with the reason."""


@dataclass(frozen=True)
class Patience:
    """How long one read may stay silent, and how often in a row it is tried again."""

    timeout: float
    retries: int


class Source(Protocol):
    """An open connection; ``read`` gives some bytes, none at the end, and raises :class:`OSError` for a failure."""

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


class ShardStream:
    """The bytes of one shard, front to back. A failed read goes on from its byte, so nothing is delivered twice."""

    def __init__(self, url: str, patience: Patience):
        self.url, self.patience = url, patience
        self.offset = 0
        self._source: Source | None = None
        self._total: int | None = None       # bytes, once an http server has named them
        self._version: str | None = None     # its ETag

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end. Raises :class:`LostShard` when patience is over."""
        parts, missing = [], size
        while missing:
            data = self._some(min(missing, CHUNK))
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _some(self, size: int) -> bytes:
        failures = 0
        while True:
            try:
                if self._source is None:
                    self._source = self._connect()
                data = self._source.read(size)
                if not data and self._total is not None and self.offset < self._total:
                    raise ConnectionError(f"the connection ended at byte {self.offset} of {self._total}")
                self.offset += len(data)
                return data
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, HTTPError):
                    error.close()
                failures += 1
                if failures > self.patience.retries or _final(error):
                    raise LostShard(f"{shown(self.url)}: {describe(error)}") from None
                pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
                log.warning("%s: %s at byte %d; attempt %d of %d in %g s", shown(self.url), describe(error),
                            self.offset, failures + 1, self.patience.retries + 1, pause)
                time.sleep(pause)

    def _connect(self) -> Source:
        """The source, at the byte that is wanted next."""
        scheme = scheme_of(self.url)
        if scheme in ("http", "https"):
            return self._request()
        if scheme in PROGRAMS or scheme == "pipe":
            return _advanced(CommandSource(self.url, self.patience.timeout), self.offset)
        return FileSource(local_path(self.url), self.offset)

    def _request(self) -> Source:
        headers = {"Accept-Encoding": "identity", "User-Agent": "tessera"}
        if self.offset:
            headers["Range"] = f"bytes={self.offset}-"
        response = urlopen(Request(self.url, headers=headers), timeout=self.patience.timeout)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(response.close)
            begin, total = _range(response)
            version = response.headers.get("ETag")
            if begin > self.offset or _differ(self._total, total) or _differ(self._version, version):
                raise LostShard(f"{shown(self.url)} changed on the server while it was read")
            self._total, self._version = total or self._total, version or self._version
            on_failure.pop_all()
        return _advanced(HttpSource(response), self.offset - begin)     # without ranges it begins at the first byte


class FileSource:
    """A local file."""

    def __init__(self, path: str, offset: int):
        self._handle = os.open(path, os.O_RDONLY)
        os.lseek(self._handle, offset, os.SEEK_SET)

    def read(self, size: int) -> bytes:
        return os.read(self._handle, size)

    def close(self) -> None:
        os.close(self._handle)


class HttpSource:
    """An http answer; the socket's timeout bounds each read."""

    def __init__(self, response: http.client.HTTPResponse):
        self._response = response
        self.close = response.close

    def read(self, size: int) -> bytes:
        return self._response.read1(size)


class CommandSource:
    """The output of a program, killed with its children when it stays silent for ``timeout`` seconds."""

    def __init__(self, url: str, timeout: float):
        self._timeout = timeout
        scheme, _, rest = url.partition(":")
        options = {"mode": "rb", "bufsize": 0, "start_new_session": True, "ignore_status": [141]}
        if scheme == "pipe":
            self._pipe = Pipe(rest, shell=True, **options)
        else:
            self._pipe = Pipe([part.format(url=url) for part in PROGRAMS[scheme]], **options)

    def read(self, size: int) -> bytes:
        ready, _, _ = select.select([self._pipe.stream], [], [], self._timeout)
        if not ready:
            raise TimeoutError(f"nothing came for {self._timeout:g} s")
        data = os.read(self._pipe.stream.fileno(), size)
        if not data:
            self._check_status()
        return data

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pipe.proc.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _check_status(self) -> None:
        try:
            status = self._pipe.proc.wait(self._timeout)
        except Exception:
            raise TimeoutError(f"its output ended, but the program ran on for {self._timeout:g} s") from None
        if status not in self._pipe.ignore_status:
            raise OSError(f"the program ended with status {status}")


def _advanced(source: Source, size: int) -> Source:
    """``source`` after its first ``size`` bytes, closed where it does not get so far."""
    try:
        while size > 0:
            data = source.read(min(size, CHUNK))
            if not data:
                raise OSError(f"it ended {size} bytes before the place already reached")
            size -= len(data)
    except BaseException:
        source.close()
        raise
    return source


def _differ(known: object, now: object) -> bool:
    return known is not None and now is not None and known != now


def _range(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte that an answer holds, and how many the whole file has (None: the server does not say)."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            raise http.client.HTTPException("an answer with a range that says not which")
        begin, total = match.groups()
        return int(begin), None if total == "*" else int(total)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _final(error: Exception) -> bool:
    """Whether another attempt is useless."""
    if isinstance(error, HTTPError):
        return error.code < 500 and error.code not in PASSING_STATUS
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def describe(error: Exception) -> str:
    """In one printable line: a server's own words may hold anything."""
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    text = str(reason) or type(error).__name__
    return text if text.isprintable() else repr(text)


def scheme_of(url: str) -> str:
    """"" for a local path."""
    match = re.match(r"(pipe(?=:)|[a-z][a-z0-9+.-]*(?=://)|(?:file|https?)(?=:))", url, re.IGNORECASE)
    return match.group(1).lower() if match else ""


def local_path(url: str) -> str:
    return url2pathname(urlsplit(url).path) if scheme_of(url) == "file" else url


def shown(url: str) -> str:
    """A URL for logs, without the user, password and query, which may be secret."""
    if scheme_of(url) not in ("http", "https"):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shard_urls(spec: str, allow_pipe: bool) -> list[str]:
    """The shards that ``spec`` names, in order: folders, globs, brace ranges and URLs, several joined by ``::``."""
    urls = [url for part in spec.split("::") for url in _part_urls(part.strip(), spec, allow_pipe)]
    twice = next((url for url in urls if urls.count(url) > 1), None) if len(set(urls)) < len(urls) else None
    if twice:
        raise UserError(f"data {spec!r} names the shard {shown(twice)} twice; give every shard once")
    return urls


def _part_urls(part: str, spec: str, allow_pipe: bool) -> list[str]:
    if not part:
        raise UserError("the data spec is empty; give a folder of .tar shards, a glob, a brace range or a URL")
    scheme = scheme_of(part)
    if scheme:
        check_scheme(scheme, part, allow_pipe)
        part = part.replace(part[:len(scheme)], scheme, 1)
        if scheme != "file":
            return expand_braces(part)
    urls: list[str] = []
    for path in expand_braces(local_path(part)):
        if os.path.isdir(path):
            path = os.path.join(path, "*.tar")
        found = sorted(glob(path)) if glob_magic(path) else [path]
        if not found:
            raise UserError(f"data {spec!r}: no shard matches {path}; check the path")
        urls += found
    return urls


def check_scheme(scheme: str, part: str, allow_pipe: bool) -> None:
    """Refuse what cannot or may not be opened."""
    if scheme not in SCHEMES:
        raise UserError(f"data {part!r}: {scheme}: is not read; use a local path, one of "
                        f"{', '.join(name + ':' for name in SCHEMES)}, or a pipe: with a program that writes the tar")
    if scheme == "pipe" and not allow_pipe:
        raise UserError(f"data {part!r} would run a shell command; set data.allow_pipe=true if you trust it")
    if scheme == "pipe" and webdataset_utils.enforce_security:
        raise UserError(f"data {part!r} would run a shell command, and WDS_SECURE forbids it in this environment")
    if scheme in PROGRAMS and shutil.which(PROGRAMS[scheme][0]) is None:
        raise UserError(f"data {part!r}: {scheme}: is read by the program {PROGRAMS[scheme][0]!r}, which is not "
                        "installed; install it, or give https: addresses")


def refuse_absent(spec: str, urls: Sequence[str], bad_shards: BadShards) -> None:
    """Raise :class:`UserError` where a local file among ``urls`` does not exist, or where none does."""
    absent = [url for url in urls if scheme_of(url) in ("", "file") and not os.path.isfile(local_path(url))]
    if absent and len(absent) == len(urls):
        raise UserError(f"data {spec!r}: the shard {absent[0]} does not exist; check the path")
    if absent and bad_shards == "refuse":
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"data {spec!r}: the shard {absent[0]} does not exist{more}; bring it back, or {SKIP}")
