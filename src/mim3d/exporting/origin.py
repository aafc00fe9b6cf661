"""What weights were learned from and at what cost, stage by stage, from the runs that made them: for the model card.

Nothing in it names a patient, a file or a folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mim3d.core.errors import Mim3dError
from mim3d.core.names import number_of
from mim3d.core.run_folder import MANIFEST_NAME, RunRecord, read_run
from mim3d.reporting.sources import is_number, read_sources, trained_s
from mim3d.weights import WeightsOrigin, locate, read_card

#: Entry of an exported card that holds the stages.
ENTRY = "learnt"

#: Scores of a run's predictions, where `mim3d report` looks for them too.
SCORES_NAME = "scores.json"

#: Scores of label maps and of classes that are shown.
_SHOWN = ("dice", "nsd", "hd95_mm", "auc", "balanced_accuracy", "accuracy")

#: Runs that began with each other's weights and are followed.
_MOST_STAGES = 8


def stages_of(located: Path, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was learned in each stage, the first one first, as plain values; empty where nothing is known.

    Args:
        located: Folder or file of the weights; that of a network in a run has the run above it.
        card: Their card. That of an export holds the stages itself.
    """
    stages: list[dict[str, Any]] = []
    began = WeightsOrigin.in_card(card)
    for _ in range(_MOST_STAGES):
        known = card.get(ENTRY)
        if isinstance(known, list):
            return [*(stage for stage in known if isinstance(stage, dict)), *stages]
        if not (located.parent / MANIFEST_NAME).is_file():
            break
        try:
            run = read_run(located.parent)
            stages.insert(0, _stage_of(run))
            weights = run.manifest["settings"].get("weights")
            if weights is None:
                return stages
            located, card = locate(weights), read_card(weights)
        except (Mim3dError, LookupError, TypeError, ValueError, OSError):
            break
    # What came before is not at hand: foreign weights, or a run that was moved.
    before = {"command": "unknown"} | ({} if began is None else {"family": began.family})
    return [before, *stages] if stages else []


def evaluation_of(located: Path) -> dict[str, Any] | None:
    """Return scores and 95 % intervals of RUN/scores.json by `mim3d evaluate`; None where there is no such file.

    Args:
        located: Folder of a network in a run.

    Raises:
        ConfigError: The file is none of scores.
    """
    run = located.parent
    if not (run / MANIFEST_NAME).is_file() or not (run / SCORES_NAME).is_file():
        return None
    _, (scores, *_) = read_sources([str(run)], [])
    content = scores.content
    rows = {"mean": {**content["mean"], "ci95": content.get("mean_ci95")}, **(content.get("per_label") or {})}
    found: dict[str, Any] = {"num_cases": len(content["cases"]), "rows": {}}
    for name, row in rows.items():
        values = {
            key: [row.get(key), *((row.get("ci95") or {}).get(key) or [])] for key in _SHOWN if is_number(row.get(key))
        }
        if values:
            found["rows"][name] = values
    return found


def score_rows(evaluation: Any) -> list[list[str]]:
    """Return scores as a table: its head, then a row for each label; empty where there are none.

    Args:
        evaluation: What :func:`evaluation_of` gave, perhaps from a card of somebody else.
    """
    rows = evaluation.get("rows") if isinstance(evaluation, dict) else None
    rows = {name: row for name, row in rows.items() if isinstance(row, dict)} if isinstance(rows, dict) else {}
    names = [name for name in _SHOWN if any(name in row for row in rows.values())]
    if not names:
        return []
    return [["", *names], *([label, *(_score(row.get(name)) for name in names)] for label, row in rows.items())]


def _score(values: Any) -> str:
    """A score with its interval."""
    if not isinstance(values, list) or not values or not all(is_number(value) for value in values):
        return "-"
    return f"{values[0]:.3f}" + (f" ({values[1]:.3f} to {values[2]:.3f})" if len(values) == 3 else "")


def _stage_of(run: RunRecord) -> dict[str, Any]:
    settings, derived = run.manifest["settings"], run.manifest.get("derived") or {}
    cohort = (derived.get("cohort") or {}).get("train") or {}
    seconds = trained_s(run)
    last = max((line["step"] for line in run.metrics), default=0)
    batch, size = derived.get("effective_batch"), derived.get("world_size") or 1
    num_scans = cohort.get("num_scans", derived.get("num_scans"))
    method = settings.get("method") or settings.get("task")
    found = {
        "command": run.manifest["command"],
        "method": method.get("name") if isinstance(method, dict) else method,
        "num_scans": num_scans,
        "num_patients": cohort.get("num_patients"),
        "modalities": cohort.get("modalities"),
        "voxels_mm": cohort.get("spacing_mm"),
        # A list of patients is named by its place on somebody's disk.
        "split": "named in a list" if str(derived.get("split")).startswith("named in") else derived.get("split"),
        "steps": last,
        "samples": None if batch is None else batch * last,
        "device": derived.get("device"),
        "devices": size,
        "device_hours": None if seconds is None else round(seconds * size / 3600, 4),
        "samples_per_s": round(batch * last / seconds, 2) if batch and seconds else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return each stage as rows of a table for people."""
    rows = []
    for stage in stages:
        if stage.get("command") == "unknown":
            family = stage.get("family")
            named = f"weights of {family}" if isinstance(family, str) else "other weights"
            rows.append({"before": f"{named}, of whose training nothing is recorded here"})
            continue
        scans = "not recorded"
        if isinstance(stage.get("num_scans"), int):
            scans = number_of(stage["num_scans"], "scan")
            if isinstance(stage.get("num_patients"), int):
                scans += f" of {number_of(stage['num_patients'], 'patient')}"
        voxels = stage.get("voxels_mm")
        row = {
            "stage": f"{stage.get('command', 'not recorded')}, {stage.get('method', 'not recorded')}",
            "scans": scans,
            "modalities": _modalities(stage.get("modalities")),
            "compute": _compute(stage),
        }
        if isinstance(voxels, list) and len(voxels) == 3 and all(isinstance(size, list) for size in voxels):
            shown = [" x ".join(f"{edge:.3g}" for edge in size) for size in voxels]
            row["voxels of the files"] = f"{shown[0]} to {shown[2]} mm, median {shown[1]} mm"
        if isinstance(stage.get("split"), str):
            row["held out"] = stage["split"]
        rows.append(row)
    return rows


def _modalities(channels: Any) -> str:
    """The modalities of each channel, with the number of scans."""
    if not isinstance(channels, list) or not all(isinstance(channel, dict) for channel in channels):
        return "not recorded"
    shown = [", ".join(f"{name} ({number})" for name, number in channel.items()) for channel in channels]
    return "; ".join(dict.fromkeys(shown)) or "not recorded"


def _compute(stage: Mapping[str, Any]) -> str:
    said = []
    if isinstance(hours := stage.get("device_hours"), (int, float)):
        device = f"{stage.get('devices', 1)} x {stage.get('device', 'device')}"
        said.append(f"{hours:.2g} device hours ({device})" if hours < 10 else f"{hours:.0f} device hours ({device})")
    if isinstance(samples := stage.get("samples"), int):
        said.append(f"{samples:,} samples in {stage.get('steps', 0):,} steps")
    if isinstance(rate := stage.get("samples_per_s"), (int, float)):
        said.append(f"{rate:g} samples per second")
    return "; ".join(said) or "not recorded"
