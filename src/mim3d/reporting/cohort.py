"""The section of the cohort: whose scans a run learned from and held out, and those that were scored."""

from collections.abc import Mapping, Sequence
from typing import Any

from mim3d.core.errors import ConfigError
from mim3d.core.settings import coerce
from mim3d.reporting.sources import NamedRun, ScoreSet

#: What the manifest of a run holds of each part of its scans.
_PART: Mapping[str, Any] = {
    "num_scans": int,
    "num_patients": int,
    "modalities": list[dict[str, int]],
    "spacing_mm": list[tuple[float, float, float]],
    "labels": dict[str, int],
    "classes": dict[str, int],
    # Runs of before noted none.
    "scanners": dict[str, int] | None,
}

#: Scanners that a cell names.
_MOST_SCANNERS = 8

#: Columns of the table; that of scanners is shown where one is known.
HEADS = (
    *("Run", "Part", "Split", "Scans", "Patients", "Modality"),
    *("Voxels in mm: median (smallest to largest)", "Scanners"),
)


def cohort(runs: Sequence[NamedRun], sets: Sequence[ScoreSet]) -> dict[str, Any]:
    """What the template of the section shows; empty where neither a run nor scores tell of it.

    Nothing is read but the manifests of the runs and the scores: no scan, no cache and no name of a patient.
    """
    rows, contents = [], []
    scored = {each.name: [each.name, "scored", "–", *_scored_row(each)] for each in sets}
    for run in runs:
        parts = parts_of(run)
        for name, part in parts.items():
            rows.append([run.name, name, _split(run), *_part_row(part)])
        if run.name in scored:
            rows.append(scored.pop(run.name))
        held = {
            kind: dict.fromkeys(name for part in parts.values() for name in part[kind])
            for kind in ("labels", "classes")
        }
        contents += [
            (
                f"Scans with each {noun} of {run.name}",
                list(parts),
                [[name, *(part[kind].get(name, 0) for part in parts.values())] for name in names],
            )
            for (kind, names), noun in zip(held.items(), ("label", "class"), strict=True)
            if names
        ]
    rows += scored.values()
    shown = len(HEADS) if any(row[-1] != "–" for row in rows) else len(HEADS) - 1
    return {"heads": HEADS[:shown], "rows": [row[:shown] for row in rows], "contents": contents} if rows else {}


def parts_of(run: NamedRun) -> dict[str, dict[str, Any]]:
    """What a run noted of each part of its scans; empty in runs that noted none, and where it is no such note."""
    noted = (run.record.manifest.get("derived") or {}).get("cohort")
    try:
        parts = coerce(noted or {}, dict[str, dict[str, Any]], "cohort")
        return {
            name: {key: coerce(part.get(key), hint, key) for key, hint in _PART.items()} for name, part in parts.items()
        }
    except ConfigError:
        return {}


def _split(run: NamedRun) -> str:
    """By what a run held cases out, as it noted."""
    noted = (run.record.manifest.get("derived") or {}).get("split")
    return noted if isinstance(noted, str) else "–"


def _part_row(part: Mapping[str, Any]) -> list[str]:
    kinds = [
        ", ".join(name if len(kind) == 1 else f"{count} {name}" for name, count in kind.items())
        for kind in part["modalities"]
    ]
    sizes = [" × ".join(f"{mm:.3g}" for mm in size) for size in part["spacing_mm"]]
    spread = (
        sizes[0] if len(set(sizes)) == 1 else f"{sizes[len(sizes) // 2]} ({sizes[0]} to {sizes[-1]})" if sizes else "–"
    )
    scanners = sorted((part["scanners"] or {}).items(), key=lambda item: -item[1])
    made_by = [f"{count} {name}" for name, count in scanners[:_MOST_SCANNERS]]
    made_by += [f"{len(scanners) - len(made_by)} more"] if len(scanners) > len(made_by) else []
    return [str(part["num_scans"]), str(part["num_patients"]), "; ".join(kinds), spread, "; ".join(made_by) or "–"]


def _scored_row(scores: ScoreSet) -> list[str]:
    patients = {str(case["patient"]) for case in scores.content["cases"] if case.get("patient") is not None}
    return [str(len(scores.cases)), str(len(patients)) if patients else "–", "–", "–", "–"]
