"""Ids of cases: readable, unique in their set, fit for the name of a file, and the same wherever the set is mounted."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mim3d.core.errors import DataError, listed
from mim3d.core.names import file_name, is_file_name, joined_name, name_digest, same_name
from mim3d.datasets.label_maps import FIRST_CHANNEL, case_of_name
from mim3d.scans.grids import split_channel
from mim3d.scans.volumes import scan_id, suffix_of

if TYPE_CHECKING:
    from mim3d.datasets.cases import Case


def unique_ids(cases: Sequence["Case"], root: str) -> list[str]:
    """An id for each case: the declared one, or the file name of the scan without suffixes.

    Scans that share an id (``a/ct.nii.gz``, ``b/ct.nii.gz``) get one from their path below ``root`` instead, or below
    the folder that they share where they lie elsewhere; files of one folder that differ by their endings alone have
    these behind their ids. Upper and lower case count as equal, as some file systems ignore the difference; what
    nothing else tells apart gets a digest of its name.

    Args:
        cases: Cases with at least one image each.
        root: Folder or list that they come from.
    """
    ids = [_declared(case.id) or scan_id(case.images[0]) for case in cases]
    places = _places([case.images[0] for case in cases], root if os.path.isdir(root) else os.path.dirname(root))
    for row in _clashing(ids):
        *folders, _ = places[row].split(os.sep)
        ids[row] = joined_name([*(part for part in folders if part), scan_id(cases[row].images[0])])
    endings = endings_apart(cases)
    for row in _clashing(ids):
        if row in endings:
            ids[row] = joined_name([ids[row], endings[row]])
    for row in _clashing(ids):
        ids[row] = f"{ids[row]}-{name_digest(places[row])}"
    return ids


def endings_apart(cases: Sequence["Case"]) -> dict[int, str]:
    """Row -> ending, such as ``nii_gz``, of scans from which another in their folder differs by its ending alone."""
    rows: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for row, case in enumerate(cases):
        folder, name = os.path.split(os.path.abspath(case.images[0]))
        ending = suffix_of(name)
        stem = unicodedata.normalize("NFC", name.removesuffix(ending))
        rows[folder, stem].append((row, ending.strip(".").replace(".", "_").lower()))
    return {row: ending for found in rows.values() if len(found) > 1 for row, ending in found if ending}


def _declared(name: str) -> str:
    """A declared id, which may be the name of a folder or a key of a description."""
    composed = unicodedata.normalize("NFC", name)
    return composed if not composed or is_file_name(composed) else file_name(composed)


def _clashing(ids: Sequence[str]) -> list[int]:
    counts = Counter(map(same_name, ids))
    return [row for row, name in enumerate(ids) if counts[same_name(name)] > 1]


def _places(paths: Sequence[str], base: str) -> list[str]:
    """Paths below a folder, or below the folder that those outside of it share: the same on every machine."""
    absolute = [os.path.abspath(path) for path in paths]
    is_below = [path.startswith(os.path.join(base, "")) for path in absolute]
    outside = [os.path.dirname(path) for path, below in zip(absolute, is_below, strict=True) if not below]
    shared = os.path.commonpath(outside) if outside else base
    return [os.path.relpath(path, base if below else shared) for path, below in zip(absolute, is_below, strict=True)]


def distinct_names(path: str, name: str, other: str) -> Iterator[str]:
    """Names for a scan whose own name belongs to another scan, the most readable first.

    Args:
        path: Address of the scan.
        name: Its own name.
        other: Address of the scan that has this name.
    """
    mine, theirs = (os.path.dirname(os.path.realpath(split_channel(each)[0])) for each in (path, other))
    shared = os.path.commonpath([mine, theirs])
    folders = [part for part in os.path.relpath(mine, shared).split(os.sep) if part != "."]
    if not folders:
        yield joined_name([name, suffix_of(split_channel(path)[0])[1:].partition(".")[0]])
    above = [part for part in shared.split(os.sep) if part] if folders else []
    for start in range(len(above), -1, -1):
        yield joined_name([*above[start:], *folders, name])
    yield f"{name}-{name_digest(os.path.realpath(path))}"


def matched_ids(ours: Sequence[str], theirs: Sequence[str], sides: tuple[str, str]) -> dict[str, str]:
    """Which id of one side belongs to which of another: the same one, or the one that differs least.

    Upper and lower case, composed letters, and the end ``_0000`` of a first channel are spelling. Of what is left,
    those belong together that differ in words for what a file is (``p1_ct``, ``p1_seg``) and that no other could
    belong to.

    Args:
        ours: Ids of one side, each once.
        theirs: Ids of the other side, each once.
        sides: What the sides are, in the plural, for the message.

    Raises:
        DataError: Several ids of a side are one of the other but for their spelling; the sentence names them.
    """
    matched = {name: name for name in set(ours) & set(theirs)}
    for mine, other in _groups(_spelling, ours, theirs, matched):
        if len(mine) > 1 or len(other) > 1:
            raise DataError(
                f"{sides[0]} {listed(mine)} and {sides[1]} {listed(other)}: which belong together is not clear from "
                "their names; rename them, so that those that belong together have the same name."
            )
        matched[mine[0]] = other[0]
    for mine, other in _groups(_whose, ours, theirs, matched):
        kinds = [case_of_name(names[0])[1] for names in (mine, other)]
        if len(mine) == len(other) == 1 and (kinds[0] == kinds[1] or not all(kinds)):
            matched[mine[0]] = other[0]
    return matched


def _spelling(name: str) -> str:
    return same_name(name).removesuffix(FIRST_CHANNEL)


def _whose(name: str) -> str:
    return _spelling(case_of_name(name)[0])


def _groups(
    key: Callable[[str], str], ours: Sequence[str], theirs: Sequence[str], matched: Mapping[str, str]
) -> list[tuple[list[str], list[str]]]:
    """The ids of both sides that are not matched and that a key makes the same."""
    sides: list[dict[str, list[str]]] = []
    for names, done in ((ours, set(matched)), (theirs, set(matched.values()))):
        sides.append(defaultdict(list))
        for name in names:
            if name not in done:
                sides[-1][key(name)].append(name)
    mine, other = sides
    return [(mine[each], other[each]) for each in mine if each and each in other]
