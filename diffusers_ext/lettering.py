"""Text in pictures: a font that has its letters, and lines that fit a width."""

from functools import cache
from pathlib import Path

from PIL import ImageFont


ELLIPSIS = "…"


def font_of(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font that has all of its letters: matplotlib's own, or else one that the machine has.

    Letters that no font has are written as escapes, such as \\u4e2d, rather than all as the same box.
    """
    letters = frozenset(text) - {"\n"}
    path = next((path for path in _fonts() if letters <= _letters(path)), None)
    if path is not None:
        return text, ImageFont.truetype(path, size)
    path = _fonts()[0]
    known = _letters(path) | {"\n"}
    legible = "".join(
        letter if letter in known else letter.encode("ascii", "backslashreplace").decode() for letter in text
    )
    return legible, ImageFont.truetype(path, size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> str:
    """The text in lines of at most a width in pixels, broken between words where possible; an ellipsis replaces what exceeds `max_lines`."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        while font.getlength(word) > width and len(word) > 1:
            part = _start_of(word, font, width)
            lines.append(part)
            word = word[len(part) :]
        line = word
    lines += [line] if line else []
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + ELLIPSIS) > width:
            last = last[:-1].rstrip()
        lines = [*lines[: max_lines - 1], last + ELLIPSIS]
    return "\n".join(lines)


def _start_of(word: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The longest start of a word that fits, of at least one letter."""
    end = next(end for end in range(len(word), 0, -1) if end == 1 or font.getlength(word[:end]) <= width)
    return word[:end]


@cache
def _fonts() -> tuple[str, ...]:
    """Files of fonts; first the one that comes with matplotlib."""
    import matplotlib
    from matplotlib import font_manager

    own = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    others = {entry.fname for entry in font_manager.fontManager.ttflist if entry.style == "normal"}
    return (own, *sorted(others - {own}))


@cache
def _letters(path: str) -> frozenset[str]:
    """The letters that a font has."""
    from matplotlib.ft2font import FT2Font

    try:
        # The last resort of matplotlib draws a box for each script.
        return frozenset() if "LastResort" in path else frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # a file that has been removed since, or is damaged
        return frozenset()
