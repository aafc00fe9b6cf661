"""Names that come from files: fit to be the name of a file, to be printed, and to be the cell of a table."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

#: Names of files have 255 bytes at most; an ending such as ``_probabilities.nii.gz`` must find room.
MAX_NAME_BYTES = 180

#: Names of devices on Windows, whatever follows their first full stop.
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)")

#: Control, format and surrogate characters, and line and paragraph separators. Two format characters join letters in
#: Persian, Hindi and others, and are kept.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")

#: First characters by which a spreadsheet takes text for a formula, also in full width.
_FORMULA = re.compile("'*[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]")


def file_name(text: str) -> str:
    """Any text as the name of a file on every system, in any script: letters, digits, ``_``, ``-`` and ``.``.

    Long text is cut, with a digest of all of it at the end, so that different texts stay different.
    """
    composed = unicodedata.normalize("NFC", text)
    safe = re.sub(r"[^\w.-]+", "_", composed).strip("._").lstrip("-._") or "scan"
    safe = _DEVICE.sub(r"\1_", safe, count=1) if _DEVICE.match(safe) else safe
    if len(safe.encode()) <= MAX_NAME_BYTES:
        return safe
    return f"{safe.encode()[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{name_digest(composed)}"


def joined_name(parts: Sequence[str]) -> str:
    """The parts of a path as the name of one file."""
    return file_name(re.sub(r"[^\w.-]+", "-", "_".join(parts)))


#: Verbs of several, and of one.
_OF_ONE = {"are": "is", "were": "was", "have": "has", "start": "starts", "show": "shows", "share": "shares"}


def verb_of(number: int, verb: str) -> str:
    """The verb that goes with a number: 1 and ``are`` give ``is``."""
    return _OF_ONE[verb] if number == 1 else verb


def number_of(number: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """A number with its noun, as ``1 scan``, ``2 scans`` or ``3 copies``; large numbers have commas.

    Args:
        number: How many.
        noun: What they are, in the singular.
        verb: What follows, in the plural: 1 and ``are`` give ``1 scan is``.
        of: How many there are in all, for ``1 of 3 scans``.
    """
    verb = verb and f" {verb_of(number, verb)}"
    if of is not None:
        return f"{number:,} of {number_of(of, noun)}{verb}"
    if number != 1 and not noun.endswith("series"):
        if re.search(r"[^aeiou]y$", noun):
            noun = f"{noun[:-1]}ies"
        else:
            noun += "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{verb}"


def cut(text: str, length: int = 200) -> str:
    """Text for a sentence, where somebody else may have made it very long."""
    return text if len(text) <= length else f"{text[:length]} ..."


def is_file_name(text: str) -> bool:
    """Whether text can be the name of a file as it is, on every system and without harm to a terminal."""
    return (
        bool(text)
        and text == printable(text)
        and not any(mark in text for mark in '/\\:*?"<>|')
        and text == text.strip(" ").rstrip(".")
        and not text.startswith((".", "-"))
        and not _DEVICE.match(text)
        and len(text.encode(errors="replace")) <= MAX_NAME_BYTES
    )


def is_entry_name(text: str) -> bool:
    """Whether text names something in a folder, and nothing outside of it; any version of mim3d may have made it."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0") and len(text) <= 255


def name_digest(text: str) -> str:
    """Eight characters that stand for a text, to tell names apart that would be the same."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]


def same_name(text: str) -> str:
    """What names have in common that some file systems take for the same: upper and lower case, composed letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def printable(text: str, *, keep: str = "") -> str:
    r"""Text without what moves the cursor, colours a terminal, hides or reverses letters: each is written as an escape.

    Args:
        text: Any text, such as the name of a file.
        keep: Characters that stay as they are, such as line ends in text of several lines.
    """
    if text.isprintable():
        return text

    def shown(mark: str) -> str:
        if mark in keep or mark in _JOINERS or unicodedata.category(mark) not in _HIDDEN:
            return mark
        return _ESCAPES.get(mark) or mark.encode("unicode_escape", errors="backslashreplace").decode()

    return "".join(map(shown, text))


def unescaped(text: str) -> str:
    """Text with the escapes of ``printable`` undone, such as the name of a file that a table holds."""

    def restored(match: re.Match[str]) -> str:
        code = match[0][1:]
        return {"n": "\n", "r": "\r", "t": "\t"}.get(code) or chr(int(code[1:], 16))

    return _ESCAPED.sub(restored, text)


def as_cell(text: str) -> str:
    """Text as a cell of a CSV file that no spreadsheet takes for a formula: behind an apostrophe where it would be.

    Some spreadsheets also part cells at ``;``, whatever stands around it.
    """
    parts = printable(text).split(";")
    return ";".join(f"'{part}" if _FORMULA.match(part) and not _is_number(part) else part for part in parts)


def from_cell(cell: str) -> str:
    """The text of a cell, without the apostrophes that ``as_cell`` puts in front."""
    return ";".join(part[1:] if part.startswith("'") and _FORMULA.match(part) else part for part in cell.split(";"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
