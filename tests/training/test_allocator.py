"""The allocator's settings are taken where the C library is glibc, and nowhere else."""

import platform

from dalle.training.allocator import keep_freed_memory


def test_glibc_takes_the_settings():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
