"""A plan for people: every setting with the numbers it follows from."""

import shutil
import textwrap
from collections.abc import Sequence

from mim3d.planning.plan import Plan, describe_intensity

#: File of a run that holds its plan.
PLAN_NAME = "plan.yaml"


def describe_plan(plan: Plan) -> list[str]:
    """Lines of a table: setting, value, and what it follows from."""
    rows = [
        ("spacing_mm", "of each scan" if plan.spacing_mm is None else _numbers(plan.spacing_mm)),
        ("intensity", describe_intensity(plan.intensity)),
        ("patch_size", _numbers(plan.patch_size)),
        ("batch_size", _numbers([plan.batch_size])),
        ("max_steps", _numbers([plan.max_steps])),
        ("positive_ratio", _numbers([plan.positive_ratio])),
        ("flip_axes", ", ".join("XYZ"[axis] for axis in plan.flip_axes or ()) or "none"),
        ("rotation_degrees", _numbers(plan.rotation_degrees)),
    ]
    width = max(len(value) for _, value in rows)
    room = max(40, shutil.get_terminal_size((120, 24)).columns - width - 22)
    lines = [f"plan (change it in the run's {PLAN_NAME} and give that back with --plan, or by flags):"]
    for name, value in rows:
        first, *more = textwrap.wrap(plan.reasons.get(name, ""), room) or [""]
        lines.append(f"  {name:16}  {value:{width}}  {first}".rstrip())
        lines += [" " * (22 + width) + part for part in more]
    return lines


def _numbers(values: Sequence[float | None] | None) -> str:
    if values is None or None in values:
        return "default"
    return " ".join(f"{value:g}" for value in values)
