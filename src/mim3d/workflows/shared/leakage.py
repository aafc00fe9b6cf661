"""Says when a held-out scan was learned from: by the encoder it starts from, or by the same run under another name.

A pre-trained network carries ``seen.json``: digest, fingerprint and marks of every scan it learned from, and nothing
else of them, neither names nor places. An exported one carries salted digests and marks, which show nothing of a scan.
"""

import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mim3d.caching.cache import Cache
from mim3d.caching.case import content_digest
from mim3d.caching.fingerprints import Fingerprint, Leak, ScanIdentity, find_leaks, fingerprint_of
from mim3d.caching.marks import Marks
from mim3d.caching.preprocessing import Prepared
from mim3d.core.errors import CheckpointError, DataError, listed
from mim3d.core.files import load_json, write_json
from mim3d.core.progress import say
from mim3d.core.run_folder import GO_ON
from mim3d.core.warned import LeakWarning
from mim3d.datasets.cases import Case
from mim3d.weights import WEIGHTS_NAME, locate

SEEN_NAME = "seen.json"
SEEN_FORMAT = 1
#: Of lists with salted scans, which earlier versions cannot read.
PUBLISHED_FORMAT = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """The scans that a network learned from.

    Attributes:
        scans: Each with what it is known by; their ids are empty.
        complete: False where it went on from weights that came without such a list.
    """

    scans: tuple[ScanIdentity, ...]
    complete: bool = True


def identities_of(scans: Cache) -> list[ScanIdentity]:
    """Cached scans by what they hold.

    Raises:
        DataError: The cache's manifest is damaged.
    """
    texts, marks = scans.fingerprints(), scans.marks()
    return [
        ScanIdentity(
            id=scan.case.id,
            digest=scan.source_digest,
            fingerprint=Fingerprint.from_text(texts[scan.case.id]),
            marks=marks.get(scan.case.id, Marks()),
        )
        for scan in scans
    ]


def identity_of(case: Case, prepared: Prepared) -> ScanIdentity:
    """A scan in memory by what it holds, as a cache of it has it.

    Args:
        case: Its files.
        prepared: The scan, prepared with marks.

    Raises:
        DataError: A file is missing.
        OSError: A file cannot be read.
    """
    in_hu = prepared.modalities[0].in_hu
    return ScanIdentity(
        id=case.id,
        digest=content_digest(case.images),
        fingerprint=fingerprint_of(prepared.image[0], prepared.spacing_mm, prepared.affine, in_hu),
        marks=prepared.marks or Marks(),
    )


def seen_from(scans: Sequence[ScanIdentity], weights: str | None) -> Seen:
    """What a network has seen that learns from ``scans``, and starts from ``weights``.

    Raises:
        CheckpointError: The list beside the weights is damaged.
    """
    earlier = Seen(scans=()) if weights is None else read_seen(weights)
    known = {} if earlier is None else {scan.digest: scan for scan in earlier.scans}
    known |= {scan.digest: replace(scan, id="") for scan in scans}
    return Seen(scans=tuple(known.values()), complete=earlier is not None and earlier.complete)


def write_seen(folder: Path, seen: Seen, remedy: str | None = GO_ON) -> None:
    """Write ``seen.json`` into a folder; sorted, so that not even the order of the scans is given away."""
    rows = sorted((row_of(scan) for scan in seen.scans), key=lambda row: row["digest"])
    format = PUBLISHED_FORMAT if any(scan.salt for scan in seen.scans) else SEEN_FORMAT
    write_json(folder / SEEN_NAME, {"format": format, "complete": seen.complete, "scans": rows}, remedy=remedy)


def row_of(scan: ScanIdentity) -> dict[str, str]:
    """What a list holds of a scan."""
    row = {"digest": scan.digest}
    if scan.fingerprint is not None:
        row["fingerprint"] = scan.fingerprint.to_text()
    if scan.marks.number:
        row["marks"] = scan.marks.to_text()
    return {**row, "salt": scan.salt} if scan.salt else row


def scan_of(row: Mapping[str, str]) -> ScanIdentity:
    """The scan that :func:`row_of` wrote.

    Raises:
        ValueError: It is none; as KeyError, TypeError and DataError are raised.
    """
    return ScanIdentity(
        id="",
        digest=str(row["digest"]),
        fingerprint=None if row.get("salt") else Fingerprint.from_text(row["fingerprint"]),
        marks=Marks.from_text(row["marks"]) if row.get("marks") else Marks(),
        salt=bytes.fromhex(row.get("salt", "")).hex(),
    )


def published(seen: Seen) -> Seen:
    """The list as it may be published: digests and marks with a salt of its own, no fingerprints."""
    salt = secrets.token_hex(16)
    return replace(seen, scans=tuple(scan if scan.salt else scan.salted(salt) for scan in seen.scans))


def seen_file(located: Path) -> Path | None:
    """The list that came with the weights in a folder or a file; None where there is none."""
    path = (located if located.is_dir() else located.parent) / SEEN_NAME
    # A list beside any other file of weights need not be theirs.
    return path if path.is_file() and (located.is_dir() or located.name == WEIGHTS_NAME) else None


def read_seen(weights: str | os.PathLike[str]) -> Seen | None:
    """What the network of a run, an exported folder or a weights file has seen; None where no list came with it.

    Raises:
        CheckpointError: There are no weights, or the list is damaged or of another format.
    """
    path = seen_file(locate(os.fspath(weights)))
    if path is None:
        return None
    try:
        content = load_json(path)
        if content["format"] not in (SEEN_FORMAT, PUBLISHED_FORMAT):
            raise CheckpointError(f"{path} is of format {content['format']}, not {PUBLISHED_FORMAT}; update mim3d.")
        scans = tuple(scan_of(row) for row in content["scans"])
        return Seen(scans=scans, complete=bool(content["complete"]))
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a list of scans ({error}); copy it again from the run, or delete it to go on "
            "without the check."
        ) from None


def say_what_is_listed(weights: str, seen: Seen | None, scans: str) -> None:
    """Say where it cannot be known, or not of all, whether scans were learned from; see :func:`unlisted`."""
    if unknown := unlisted(weights, seen, scans):
        say(f"note: {unknown}")


def unlisted(weights: str, seen: Seen | None, scans: str) -> str:
    """What cannot be known of the scans that weights learned from, in a sentence; nothing where all of them are listed.

    Args:
        weights: Where the weights lie.
        seen: The list that came with them; None without one.
        scans: Whose check it is, in words.
    """
    if seen is not None and seen.complete:
        return ""
    part = "no list" if seen is None else "only part of a list"
    return (
        f"{weights} comes with {part} of the scans it learned from: whether {scans} are among them cannot be checked."
    )


def check_pretraining(weights: str | None, held_out: Sequence[ScanIdentity], *, strict: bool) -> list[Leak]:
    """Say which held-out scans the network of ``weights`` has learned from; a note where that cannot be known.

    Returns:
        What was found.

    Raises:
        DataError: ``strict``, and there is one.
        CheckpointError: The list beside the weights is damaged.
    """
    if weights is None or not held_out:
        return []
    seen = read_seen(weights)
    say_what_is_listed(weights, seen, "held-out ones")
    if seen is None:
        return []
    return check_leakage(seen.scans, held_out, place=f"in the pre-training data of {weights}", strict=strict)


def check_leakage(
    training: Sequence[ScanIdentity],
    held_out: Sequence[ScanIdentity],
    *,
    strict: bool,
    place: str = "among the training cases too",
) -> list[Leak]:
    """Warn of held-out scans that were learned from, in one sentence.

    Args:
        training: Scans that were, or will be, learned from.
        held_out: Scans that scores are computed on.
        strict: Whether they are refused.
        place: Place where they were found, as the sentence goes on: ``in the pre-training data of RUN``; of scans of
            the same run under another name if not given.
    Returns:
        What was found.
    Raises:
        DataError: ``strict``, and there is one.
    """
    if leaks := find_leaks(training, held_out):
        sentence = leaks_in_words(leaks, len(held_out), place=place)
        if strict:
            raise DataError(f"{sentence} (strict: refused)")
        warnings.warn(sentence, category=LeakWarning, stacklevel=2)
    return leaks


def leaks_in_words(
    leaks: Sequence[Leak],
    num_held_out: int,
    *,
    place: str = "among the training cases too",
    remedy: str = "leave such cases out of one of both parts, or give both the same patient",
) -> str:
    """The sentence about leaks, of so many held-out scans; ``place`` as for :func:`check_leakage`, ``remedy`` alike."""
    # A scan that is there as it is and converted is reported as it is.
    nearest = {leak.held_out: leak for leak in sorted(leaks, key=lambda leak: -leak.distance)}
    in_order = [nearest[name] for name in dict.fromkeys(leak.held_out for leak in leaks)]
    described = [f"{leak.held_out} ({leak.how}{f' as {leak.training}' if leak.training else ''})" for leak in in_order]
    one = len(in_order) == 1
    return (
        f"{len(in_order)} of {num_held_out} held-out cases {'is' if one else 'are'} {place}: "
        f"{listed(described)}; scores on {'it' if one else 'them'} say nothing about new "
        f"patients, so {remedy}."
    )
