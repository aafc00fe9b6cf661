"""Tasks by name. A new task is one file and one line here; a user's own is named by dotted path."""

from mim3d.core.settings import resolve
from mim3d.core.types import Named
from mim3d.tasks.contract import Task

#: Settings class of each task, imported when asked for.
TASKS: dict[str, str] = {
    "segmentation": "mim3d.tasks.segmentation.task:Segmentation",
    "classification": "mim3d.tasks.classification.task:Classification",
}


def create_task(task: Named, *, allow_import: bool = True) -> Task:
    """The settings of a task by name, dotted path or mapping; raises ConfigError with the nearest known name.

    Args:
        task: the name or mapping.
        allow_import: whether a dotted path may be imported; false for cards that somebody else may have written.
    """
    settings = resolve(task, TASKS, "task", allow_import=allow_import)
    assert isinstance(settings, Task)
    return settings
