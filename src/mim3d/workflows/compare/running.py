"""A comparison from its settings to its tables: planned, run cell by cell, stopped and gone on with at any moment."""

from mim3d.core.settings import CONFIG_NAME, write_yaml
from mim3d.workflows.compare.arm_cells import with_cells
from mim3d.workflows.compare.budget import say_cells, steps_of
from mim3d.workflows.compare.checks import check_arms
from mim3d.workflows.compare.plan import Plan, settle
from mim3d.workflows.compare.settings import CompareSettings


def run_comparison(settings: CompareSettings) -> str:
    """Compare arms, and return the folder of the comparison."""
    plan = planned(settings.with_recipes())
    if settings.dry_run:
        say_cells(plan)
    return settings.out


def planned(settings: CompareSettings) -> Plan:
    """The plan with all its cells, saved in its folder."""
    plan = settle(settings)
    check_arms(plan)
    plan = with_cells(plan, steps_of(plan))
    plan.save()
    write_yaml(plan.out / CONFIG_NAME, settings.to_config())
    return plan
