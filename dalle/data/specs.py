"""What a data spec spells: brace ranges written out, and whether a name holds wildcards."""

import re

from dalle.errors import UserError


def glob_magic(text: str) -> bool:
    return any(character in text for character in "*?[")


def expand_braces(text: str) -> list[str]:
    """``a{08..10}.tar`` -> a08.tar, a09.tar, a10.tar and ``{x,y}.tar`` -> x.tar, y.tar; several braces multiply."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise UserError(f"the range {match.group(0)} in {text!r} is empty; write the smaller number first")
    tails = expand_braces(text[match.end():])
    return [text[:match.start()] + choice + tail for choice in choices for tail in tails]
