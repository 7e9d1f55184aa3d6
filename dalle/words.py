"""Text as commands say it: in one line, short enough, with times that can be read."""

from typing import Any


def one_line(value: Any) -> str:
    """The text of ``value`` (an error, say) with a single space wherever it has any."""
    return " ".join(str(value).split())


def cell(value: Any) -> str:
    """``value`` as one cell of a markdown table."""
    return one_line(str(value).replace("|", "\\|"))


def shorten(text: str, length: int = 60) -> str:
    """``text``, or so much of it that it ends in an ellipsis at ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def duration(seconds: float) -> str:
    """``seconds`` as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
