"""What of a caption a model does not read, said in lines."""

from collections.abc import Sequence

from dalle.data.tokenizer import CaptionTokenizer
from dalle.words import shorten


def lost_warnings(captions: Sequence[str], tokenizer: CaptionTokenizer, length: int, what: str) -> list[str]:
    """A line for each different caption of more than ``length`` tokens, and for each with words that are unknown."""
    lines = []
    for caption in dict.fromkeys(captions):
        lost = tokenizer.what_is_lost(caption, length)
        if lost.cut:
            lines.append(cut_warning(what, caption, length + lost.cut, length))
        if lost.unknown:
            lines.append(unknown_warning(what, caption, lost.unknown))
    return lines


def cut_warning(what: str, caption: str, count: int, length: int, unit: str = "tokens") -> str:
    """That a model reads ``length`` of the ``count`` units of a caption."""
    return (f"the {what} \"{shorten(caption)}\" has {count} {unit}, this model reads {length}: "
            f"the first {length} are kept")


def unknown_warning(what: str, caption: str, unknown: Sequence[str], unit: str = "words") -> str:
    """That a model cannot tell ``unknown`` from one another."""
    return (f"the {what} \"{shorten(caption)}\" has {unit} that this model does not know, all the same to it: "
            f"{shorten(' '.join(unknown))}")
