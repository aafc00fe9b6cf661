"""The section of segmentations: which cases are shown, in what order, and what stands beside each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mim3d.core.errors import ConfigError, Mim3dError, listed
from mim3d.core.names import cut
from mim3d.reporting import overlays
from mim3d.reporting.rendering import LabelColours, label_colours, number
from mim3d.reporting.sources import ScoreSet, related_sets
from mim3d.scans.grids import is_there

#: Cases that are shown unless some are named: the worst, the median, the best, and others evenly between them.
NUM_SHOWN = 7
#: Most labels whose Dice a caption names.
_NAMED_LABELS = 4


@dataclass(frozen=True, kw_only=True)
class ShownCase:
    """A case with its images.

    Attributes:
        title: Its place among all cases, and its id.
        remark: What is to be known of it, or why it is not shown; empty where nothing is.
        figures: For every set that predicted it the set, its Dice and its image.
    """

    title: str
    remark: str
    figures: Sequence[tuple[ScoreSet, str, str]]


def segmentations(sets: Sequence[ScoreSet], wanted: Sequence[str] = ()) -> dict[str, Any]:
    """What the template of the section shows, unrelated data sets apart; empty where there are no cases.

    Args:
        sets: Scores of label maps.
        wanted: Ids of the cases to show; some from the worst to the best by their mean Dice if none is named.

    Raises:
        ConfigError: An id that no set has.
    """
    every = {name for each in sets for name in each.cases}
    if unknown := [name for name in wanted if name not in every]:
        known = f"they have {listed(sorted(every), 9)}" if every else "there are none of label maps"
        raise ConfigError(f"cases names {cut(unknown[0])!r}, which no file of scores has: {known}.")
    groups = [group for related in related_sets(sets) if (group := _group(related, wanted))]
    return {"groups": groups} if groups else {}


def _group(sets: Sequence[ScoreSet], wanted: Sequence[str]) -> dict[str, Any]:
    """The cases of one data set, empty where none is to be shown."""
    ranked = ranked_cases(sets)
    labels = dict(sorted({value: name for each in sets for value, name in each.labels.items() if value}.items()))
    colours = {value: label_colours(position) for position, value in enumerate(labels)}
    held = [name for name in wanted if any(name in each.cases for each in sets)]
    chosen = [(name, _title(name, ranked)) for name in held] if wanted else spread_out(ranked)
    if not chosen:
        return {}
    return {
        "sets": sets,
        "labels": [(name, colours[value]) for value, name in labels.items()],
        "cases": [_shown(case_id, title, sets, colours) for case_id, title in chosen],
        "num_cases": len(ranked),
    }


def ranked_cases(sets: Sequence[ScoreSet]) -> list[str]:
    """Ids from the worst to the best mean Dice, over labels and sets, of the cases that all sets scored.

    Those of the first set stand in where no case is shared.
    """
    shared = set.intersection(*(set(each.cases) for each in sets)) if sets else set()
    means = {}
    for case_id in sorted(shared or {name for each in sets[:1] for name in each.cases}):
        dice = [case_mean(each.cases[case_id], "dice") for each in sets if case_id in each.cases]
        known = [value for value in dice if value is not None]
        if known:
            means[case_id] = float(np.mean(known))
    return sorted(means, key=lambda name: means[name])


def spread_out(ranked: Sequence[str]) -> list[tuple[str, str]]:
    """Some of the cases from the worst to the best, the median among them, each with its title."""
    middle, last = (len(ranked) - 1) // 2, len(ranked) - 1
    halves = [*np.linspace(0, middle, NUM_SHOWN // 2 + 1), *np.linspace(middle, last, NUM_SHOWN // 2 + 1)]
    places = sorted({round(place) for place in halves})
    return [(ranked[place], _title(ranked[place], ranked)) for place in places if ranked]


def _title(case_id: str, ranked: Sequence[str]) -> str:
    if case_id not in ranked:
        return case_id
    place = ranked.index(case_id)
    names = {0: "Worst case", (len(ranked) - 1) // 2: "Median case", len(ranked) - 1: "Best case"}
    named = names.get(place) if len(ranked) >= 3 else None
    return f"{named or f'Case {place + 1} of {len(ranked)}'}: {case_id}"


def case_mean(case: Mapping[str, Any], key: str) -> float | None:
    """Mean of a score over the labels of a case that have it, or None where none has."""
    values = [score.get(key) for score in case["labels"].values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shown(case_id: str, title: str, sets: Sequence[ScoreSet], colours: Mapping[int, LabelColours]) -> ShownCase:
    """A case with the image of every set that predicted it."""
    held = [each for each in sets if case_id in each.cases and each.cases[case_id].get("prediction") is not None]
    if not held:
        return ShownCase(title=title, remark="Not predicted; it is scored as an empty prediction.", figures=())
    cases = [each.cases[case_id] for each in held]
    images = [path for case in cases for path in (case.get("images") or ())]
    image = images[0] if images and is_there(images[0]) else None
    try:
        region = overlays.read_region(str(cases[0]["reference"]), [str(case["prediction"]) for case in cases], image)
    except Mim3dError as error:
        return ShownCase(title=title, remark=f"{case_id} cannot be shown: {error}", figures=())
    if image is None:
        remark = f"The scan of {case_id} is not known or no longer there, so its labels are shown on black."
    else:
        low, high = region.window
        remark = f"Grey values from {number(low, 0)} (black) to {number(high, 0)} (white)."
        if high - low < 20:
            remark = f"Grey values from {number(low, 2)} (black) to {number(high, 2)} (white)."
    figures = []
    for each, case, prediction in zip(held, cases, region.predictions, strict=True):
        dice = [f"{name} {number(score.get('dice'), 3)}" for name, score in case["labels"].items()]
        mean = f"mean {number(case_mean(case, 'dice'), 3)}"
        caption = ", ".join([*(dice if len(dice) <= _NAMED_LABELS else []), mean])
        figures.append((each, caption, overlays.overlay_image(region, prediction, colours)))
    return ShownCase(title=title, remark=remark, figures=figures)
