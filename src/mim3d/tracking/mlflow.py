"""MLflow: a server, a database, or a folder with a database of its own."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim3d.tracking.tracker import Images, SessionInfo

#: The experiment that runs belong to, unless MLFLOW_EXPERIMENT_NAME names another.
EXPERIMENT = "mim3d"

#: Most parameters that MLflow takes in one call, and most characters of one parameter.
_MAX_PARAMS = 100
_MAX_LENGTH = 6000

#: Without these, its client retries for minutes, in which training would stand still.
_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


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
        for variable, value in _TIMEOUTS.items():
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
        params = [Param(allowed_name(key), str(value)[:_MAX_LENGTH]) for key, value in session.settings.items()]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MAX_PARAMS])
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
