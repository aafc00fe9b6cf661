"""Trackers: which of them show a run, what each does, and TensorBoard, Weights & Biases and MLflow.

TensorBoard writes event files into the run folder; Weights & Biases works with or without network
(``WANDB_MODE=offline``); MLflow writes to a server, a database, or a folder with a database of its own.
"""

import importlib.util
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError

#: Images by name, ``(H, W)`` grey values from 0 to 255, first row at the top.
Images = Mapping[str, npt.NDArray[np.uint8]]

#: Folder of TensorBoard's events in a run folder.
FOLDER = "tensorboard"

#: Seconds that Weights & Biases may take to start a run.
_WANDB_TIMEOUT_S = 30

#: The experiment of MLflow that runs belong to, unless MLFLOW_EXPERIMENT_NAME names another.
EXPERIMENT = "mim3d"

#: Most parameters that MLflow takes in one call, and most characters of one parameter.
_MLFLOW_MAX_PARAMS = 100
_MLFLOW_MAX_LENGTH = 6000

#: Without these, MLflow's client retries for minutes, in which training would stand still.
_MLFLOW_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

#: What the settings take, by their names.
_WHAT = {"wandb": "the name of a project", "mlflow": "the URI of a server or database, or a folder"}


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
                    f"tracking.{name} needs the package {name}, which is not installed: pip install 'mim3d[{name}]'"
                )


@dataclass(frozen=True)
class SessionInfo:
    """What a tracker receives when a session of training starts.

    Attributes:
        name: Name of the run.
        folder: Folder of the run.
        parameters: Settings of the run as plain values by dotted name, to be shown.
        step: Last step of earlier sessions, or 0 in a new run. What a tracker holds of later steps is void.
        known_id: What :meth:`Tracker.start` returned in an earlier session, or None the first time.
    """

    name: str
    folder: Path
    parameters: Mapping[str, Any]
    step: int
    known_id: str | None = None


class Tracker(Protocol):
    """One place that shows runs. Any of its methods may raise whatever its package raises."""

    @property
    def name(self) -> str:
        """The setting that switches the tracker on."""
        ...

    @property
    def target(self) -> str:
        """Where the tracker writes to. A run resumed with another target is a new run there."""
        ...

    def start(self, session: SessionInfo) -> str | None:
        """Start a run, or continue the run ``known_id``.

        Returns:
            The id by which a later session can continue the run, or None where none is needed.
        """
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers by name."""
        ...

    def log_images(self, step: int, images: Images) -> None:
        """Log images by name."""
        ...

    def finish(self, *, failed: bool) -> None:
        """Send what is left, and close the run as finished or failed."""
        ...


class TensorBoard:
    """Events in OUT/tensorboard; those that an interrupted session wrote after the resumed step are purged."""

    name = "tensorboard"
    target = FOLDER

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, session: SessionInfo) -> str | None:
        """Open a new file of events, and write the settings into it."""
        from torch.utils import tensorboard

        writer_of: Any = tensorboard.SummaryWriter
        self._writer = writer_of(str(session.folder / FOLDER), purge_step=session.step + 1)
        # TensorBoard reads Markdown, in which an indented block stays as it is.
        text = "\n".join(f"    {name}: {value}" for name, value in session.parameters.items())
        self._writer.add_text("settings", text, session.step)
        return None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers at once: after a kill, the events must not lag behind the checkpoint."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_images(self, step: int, images: Images) -> None:
        """Write images."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HW")
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; a resumed run continues under the same id.

    Args:
        project: Name of the project.
    """

    name = "wandb"

    def __init__(self, project: str) -> None:
        self.target = project
        self._run: Any = None

    def start(self, session: SessionInfo) -> str | None:
        """Start or continue the run, and return its id."""
        import wandb

        self._run = wandb.init(
            project=self.target,
            name=session.name,
            id=session.known_id,
            resume=None if session.known_id is None else "allow",
            dir=str(session.folder),
            config=dict(session.parameters),
            # The command's own output is no concern of the tracker's; without network, training waits no longer.
            settings=wandb.Settings(console="off", init_timeout=_WANDB_TIMEOUT_S),
        )
        # Not W&B's own counter: it never goes back, so that it would drop what is logged again after a resume.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers."""
        self._run.log({"step": step, **values})

    def log_images(self, step: int, images: Images) -> None:
        """Send images."""
        import wandb

        self._run.log({"step": step, **{name: wandb.Image(image) for name, image in images.items()}})

    def finish(self, *, failed: bool) -> None:
        """Wait until everything is sent, and close the run."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an experiment; a resumed run continues under the same id.

    Args:
        target: URI of a server or database, or a folder, whose ``mlflow.db`` and ``artifacts`` are used.
    """

    name = "mlflow"

    def __init__(self, target: str) -> None:
        self.target = target
        self._client: Any = None
        self._id = ""

    def start(self, session: SessionInfo) -> str | None:
        """Start or continue the run, and return its id."""
        for variable, value in _MLFLOW_TIMEOUTS.items():
            os.environ.setdefault(variable, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri, artifacts = store_uris(self.target)
        self._client = MlflowClient(tracking_uri=uri)
        if session.known_id is not None:
            self._id = session.known_id
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        known = None if experiment is None else experiment.experiment_id
        number = known or self._client.create_experiment(name, artifact_location=artifacts)
        self._id = str(self._client.create_run(number, run_name=session.name).info.run_id)
        params = [
            Param(allowed_name(key), str(value)[:_MLFLOW_MAX_LENGTH]) for key, value in session.parameters.items()
        ]
        for first in range(0, len(params), _MLFLOW_MAX_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MLFLOW_MAX_PARAMS])
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(allowed_name(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def log_images(self, step: int, images: Images) -> None:
        """Send images."""
        for name, image in images.items():
            self._client.log_image(self._id, image, key=allowed_name(name), step=step)

    def finish(self, *, failed: bool) -> None:
        """Close the run."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def store_uris(target: str) -> tuple[str, str | None]:
    """URIs of a server, a database, or a folder, which is created.

    A plain folder gets a database, since MLflow no longer writes runs as folders of files.

    Returns:
        The tracking URI, and the URI of the artifacts, or None where the server knows it.
    """
    if "://" in target:
        return target, None
    folder = Path(target).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()


def allowed_name(name: str) -> str:
    """A name reduced to the characters and the length that MLflow allows."""
    return re.sub(r"/+", "/", re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)).strip("/")[:250]
