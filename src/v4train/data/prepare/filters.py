"""Simple quality filters: by the text of a document alone, and each with a name under which what it left out is counted."""

import unicodedata

from v4train.data.prepare import config as config_lib


def refusal(text: str, *, filters: config_lib.FilterConfig) -> str | None:
    """The name of the first filter that a text does not pass, or None."""
    if len(text) < filters.min_chars:
        return "min_chars"
    if filters.max_chars is not None and len(text) > filters.max_chars:
        return "max_chars"
    if filters.min_printable and printable(text) < filters.min_printable:
        return "min_printable"
    if filters.min_letters and letters(text) < filters.min_letters:
        return "min_letters"
    if filters.max_repeated_lines < 1 and repeated_lines(text) > filters.max_repeated_lines:
        return "max_repeated_lines"
    return None


def printable(text: str) -> float:
    """Share of characters that are printable or white space; 1 for no text."""
    return sum(c.isprintable() or c.isspace() for c in text) / len(text) if text else 1.0


def letters(text: str) -> float:
    """Share of letters, with their accents, among the characters that are not white space; 1 for no text."""
    solid = [c for c in text if not c.isspace()]
    return sum(c.isalpha() or unicodedata.category(c).startswith("M") for c in solid) / len(solid) if solid else 1.0


def repeated_lines(text: str) -> float:
    """Share of non-empty lines that came before; 0 for no lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0
