"""What a person sees while pictures are painted: a live line on a terminal, a plain one now and then elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_UPDATES = 0.2      # of a live line


class PaintingProgress:
    """Called with the pictures' worth of work that is done, and with how many there are, the last time with all."""

    def __init__(self):
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done: float, total: int) -> None:
        now = time.monotonic()
        waits = SECONDS_BETWEEN_UPDATES if self.live else SECONDS_BETWEEN_LINES
        if done >= total:
            self._line(f"painted {total} of {total} pictures in {now - self.began:.1f} s "
                       f"({total / max(now - self.began, 1e-9):.1f} a second)", last=True)
        elif now - self.shown >= waits:
            self.shown = now
            left = (now - self.began) / done * (total - done) if done else float("inf")
            self._line(f"painted {int(done)} of {total} pictures ({done / total:.0%}), {left:.0f} s left", last=False)

    def _line(self, text: str, last: bool) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, end="" if self.live and not last else "\n", file=sys.stderr,
              flush=True)
