"""Whether embedded scans are among those that the weights were learned from: said once, and kept with the features.

What a scan is known by is kept with its rows until the table is written, so that a call that was killed loses nothing;
the description of the table holds no more than whether it was learned from.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mim3d.caching.fingerprints import find_leaks
from mim3d.core.errors import DataError, listed
from mim3d.core.names import number_of
from mim3d.core.warned import LeakWarning
from mim3d.datasets.cases import Case
from mim3d.workflows.embed.store import FeatureStore, Finished
from mim3d.workflows.shared.leakage import Seen, say_what_is_listed, scan_of

#: Entry of a finished scan that holds what it is known by, until it is looked up.
IDENTITY = "identity"

#: And whether it was learned from: how it was found in the list, or nothing.
LEARNED = "learned_from"


def look_up(store: FeatureStore, seen: Seen | None) -> None:
    """Note of each finished scan that was not looked up yet whether it was learned from.

    Args:
        store: What holds the scans.
        seen: The scans that the weights were learned from; None where no list came with them.
    """
    waiting = {name: each.about[IDENTITY] for name, each in store.finished.items() if IDENTITY in each.about}
    known = {}
    for name, row in waiting.items():
        # A file of a call that was killed may hold anything.
        try:
            known[name] = replace(scan_of(row), id=name)
        except (ValueError, KeyError, TypeError, AttributeError, DataError):
            continue
    leaks = [] if seen is None else find_leaks(seen.scans, list(known.values()))
    # A scan that is there as it is and converted is there as it is.
    hows = {leak.held_out: leak.how for leak in sorted(leaks, key=lambda leak: -leak.distance)}
    for name in waiting:
        about = {key: value for key, value in store.finished[name].about.items() if key != IDENTITY}
        if seen is not None and name in known:
            about[LEARNED] = hows.get(name, "")
        store.finished[name] = Finished(about, store.finished[name].table)


def say_leaks(cases: Sequence[Case], store: FeatureStore, seen: Seen | None, weights: str) -> dict[str, Any]:
    """Warn of the scans that were learned from, and return what the description of the table says of it."""
    say_what_is_listed(weights, seen, "the scans")
    abouts = {case.id: store.finished[case.id].about for case in cases if case.id in store.finished}
    found = {name: str(about[LEARNED]) for name, about in abouts.items() if about.get(LEARNED)}
    if found:
        them = "it" if len(found) == 1 else "them"
        warnings.warn(
            f"{number_of(len(found), 'scan', 'are', of=len(cases))} in the pre-training data of {weights}: "
            f"{listed([f'{name} ({how})' for name, how in found.items()])}; scores on {them} say nothing about new "
            f"patients, so leave {them} out of what features are tested on.",
            category=LeakWarning,
            stacklevel=3,
        )
    unknown = [] if seen is None else [name for name, about in abouts.items() if LEARNED not in about]
    if unknown:
        warnings.warn(
            f"{number_of(len(unknown), 'scan', 'were', of=len(cases))} embedded before scans were looked up in the "
            f"list that comes with {weights}: {listed(unknown)}; --overwrite true does them again.",
            category=LeakWarning,
            stacklevel=3,
        )
    part = "none" if seen is None else "whole" if seen.complete else "part"
    return {"list": part, "found": found, "unknown": unknown}
