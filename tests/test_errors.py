"""How a command ends: one line for what its user can mend, a traceback for what only we can."""

import errno
import os

import numpy as np
import pytest
import torch

from dalle.errors import LostProcess, UserError, run_command


def ending(capsys, error: BaseException, **options) -> tuple[int, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main, **options)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("number", "words"), [
    (errno.EROFS, "Read-only file system; give a place that can be written"),
    (errno.EACCES, "Permission denied; give a place that you may read and write"),
    (errno.ENOSPC, "No space left on device; make room"),
    (errno.ENOTDIR, "Not a directory; a file is where a folder is needed"),
    (errno.EMFILE, "Too many open files; allow more open files (ulimit -n)"),
])
def test_a_place_that_cannot_be_used_is_one_line(capsys, number, words):
    status, printed = ending(capsys, OSError(number, os.strerror(number), "/there/file"))
    assert status == 2 and printed.startswith(f"error: /there/file: {words}") and printed.count("\n") == 1


def test_what_the_system_really_raises_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    try:
        (tmp_path / "file" / "folder").mkdir()
    except OSError as error:
        status, printed = ending(capsys, error)
    assert status == 2 and printed.count("\n") == 1


def raised(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"),
    raised(lambda: torch.empty(2**60, dtype=torch.uint8)), raised(lambda: np.empty(2**60, np.uint8)),
], ids=["python", "cuda", "torch", "numpy"])
def test_too_little_memory_is_one_line_with_what_helps(capsys, error):
    status, printed = ending(capsys, error, save_memory="set train.micro_batch_size to less")
    assert status == 2 and printed.startswith("error: out of memory: ") and printed.count("\n") == 1
    assert printed.endswith("; set train.micro_batch_size to less\n")


@pytest.mark.parametrize("error", [
    RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("x"), OSError("x")])
def test_faults_of_the_program_keep_their_traceback(error):
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(main)


@pytest.mark.parametrize(("error", "status"), [(UserError("so"), 2), (LostProcess("so"), 76)])
def test_what_was_said_already_is_said_as_it_is(capsys, error, status):
    assert ending(capsys, error) == (status, "error: so\n")
