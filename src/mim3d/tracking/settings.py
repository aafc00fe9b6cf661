"""Which trackers show a run."""

import importlib.util
from dataclasses import dataclass
from urllib.parse import urlsplit

from mim3d.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Trackers beside ``metrics.jsonl``, which is always written.

    Attributes:
        tensorboard: Whether events for TensorBoard are written to OUT/tensorboard.
        wandb: Name of a project at Weights & Biases.
        mlflow: URI of an MLflow server or database, or a folder.

    Raises:
        ConfigError: A name is empty, or the URI holds a password.
    """

    tensorboard: bool = False
    wandb: str | None = None
    mlflow: str | None = None

    def __post_init__(self) -> None:
        for name in ("wandb", "mlflow"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(f"tracking.{name} is empty; give {_WHAT[name]}, or leave it out.")
        if self.mlflow is not None and urlsplit(self.mlflow).password:
            raise ConfigError(
                "tracking.mlflow holds a password, which would be written into the run's settings; give it in the "
                "environment instead (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server)."
            )

    def require_packages(self) -> None:
        """Refuse trackers whose package is missing, before any work.

        Raises:
            ConfigError: A package is missing. The message has the command that installs it.
        """
        for name in ("tensorboard", "wandb", "mlflow"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"tracking.{name} needs the package {name}, which is not installed: pip install mim3d[{name}]"
                )


_WHAT = {"wandb": "the name of a project", "mlflow": "the URI of a server or database, or a folder"}
