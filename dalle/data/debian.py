"""Debian packages, installed with apt-get while other processes may be installing too.

``python -m dalle.data.debian PACKAGE...`` installs those that are missing.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from dalle.errors import UserError

LOCK_SECONDS = 600        # as long as an unattended upgrade may hold a lock
LOCK_PAUSE = 5            # seconds between two looks at a lock that apt-get does not wait for itself


def missing(packages: Sequence[str]) -> list[str]:
    """Those of the packages that dpkg does not have as installed; all of them where there is no dpkg."""
    return [package for package in packages if not _installed(package)]


def _installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f=${Status}", package]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout == "install ok installed"
    except FileNotFoundError:
        return False


def install(packages: Sequence[str], report=print) -> None:
    """Install the packages as root; :class:`UserError` with apt-get's last line where it fails."""
    report(f"installing Debian packages: {' '.join(packages)}")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        apt_get(command, report)


def apt_get(arguments: Sequence[str], report=print) -> None:
    """Run apt-get, waiting up to LOCK_SECONDS for each lock that another process holds.

    ``DPkg::Lock::Timeout`` covers dpkg's own lock; those of the package lists (``update``) and of the archives are
    tried once by apt-get, and so again from here.
    """
    command = ["apt-get", "-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}", *arguments]
    ends, waiting = time.monotonic() + LOCK_SECONDS, False
    while (failure := _failure(command)) is not None:
        if "Could not get lock" not in failure or time.monotonic() >= ends:
            raise UserError(f"{' '.join(command)} failed: {failure.splitlines()[-1]}")
        if not waiting:
            report(f"waiting for another process: {failure.splitlines()[0]}")
        waiting = True
        time.sleep(LOCK_PAUSE)


def _failure(command: list[str]) -> str | None:
    """What the command said when it failed, None if it did not."""
    try:
        result = subprocess.run(command, capture_output=True, text=True,
                                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"})
    except FileNotFoundError:
        raise UserError("there is no apt-get here; install the packages in this system's way: "
                        f"{' '.join(command)}") from None
    if result.returncode == 0:
        return None
    return (result.stderr.strip() or result.stdout.strip() or f"status {result.returncode}")


def main() -> int:
    """Install what is missing of the packages on the command line."""
    try:
        if absent := missing(sys.argv[1:]):
            install(absent)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
