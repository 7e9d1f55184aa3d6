"""What a user did wrong, said in one line, without a traceback."""

import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2


class UserError(Exception):
    """A mistake in what the user gave (a path, a key, a value): the message says what, where and what to do."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit: 0 or what it returns, 2 with one line on stderr for a :class:`UserError`."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status or 0)
