"""Memory on the CPU: keep what a step frees, because the next step asks for the same again."""

import ctypes
import sys

# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20    # what glibc accepts on 64 bits
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MiB for this process instead of giving them back to the system.

    By default every large activation is a fresh mapping, whose pages the kernel zeroes one fault at a time, at every
    step. Returns whether the settings were taken (False where the C library is not glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: _KEPT, _TOP_PAD: 64 << 20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
