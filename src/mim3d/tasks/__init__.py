"""Tasks by name. A new task is one file and one line here; a user's own is named by dotted path."""

from typing import TYPE_CHECKING

from mim3d.core.errors import ConfigError
from mim3d.core.settings import find_named, resolve
from mim3d.core.types import Named

if TYPE_CHECKING:
    from mim3d.tasks.contract import Task

#: Settings class of each task, imported when asked for.
TASKS: dict[str, str] = {
    "segmentation": "mim3d.tasks.segmentation.task:Segmentation",
    "classification": "mim3d.tasks.classification.task:Classification",
}


def create_task(task: Named, *, allow_import: bool = True) -> "Task":
    """Create the settings of a task from its name, its dotted path, or a mapping of both and settings.

    Args:
        task: The name or mapping.
        allow_import: Whether a dotted path may be imported. It is false for cards that somebody else may have written.

    Raises:
        ConfigError: The task is unknown (the nearest known one is offered), is no task, or a setting is wrong.
    """
    settings = resolve(task, TASKS, "task", allow_import=allow_import)
    _require_task(type(settings))
    return settings


def find_task(name: str) -> "type[Task]":
    """Find the class of a task by its name or by the dotted path of a user's own, which is imported.

    Raises:
        ConfigError: The task is unknown (the nearest known one is offered), or is no task.
    """
    found = find_named(name, TASKS, "task")
    return _require_task(found if isinstance(found, type) else type(found))


def _require_task(kind: type) -> "type[Task]":
    # Scores of label maps are made in processes that import this package, but have no use for torch.
    from mim3d.tasks.contract import Task

    if not issubclass(kind, Task):
        raise ConfigError(f"task '{kind.__module__}.{kind.__name__}' does not extend mim3d.tasks.contract.Task.")
    return kind
