"""MLflow: a server, a database, or a folder with a database of its own."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim3d.tracking.tracker import Beginning, Images

#: Where runs are filed, unless MLFLOW_EXPERIMENT_NAME says otherwise.
EXPERIMENT = "mim3d"

#: What MLflow takes in one call, and of one parameter.
_MAX_PARAMS = 100
_MAX_LENGTH = 6000

#: Its client tries for minutes by default, in which training would stand still.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MLflow:
    """A run of an experiment; a resumed one goes on under the same id.

    Args:
        uri: of a server or database; or a folder, whose ``mlflow.db`` and ``artifacts`` are used.
    """

    name = "mlflow"

    def __init__(self, uri: str) -> None:
        self.target = uri
        self._client: Any = None
        self._id = ""

    def start(self, beginning: Beginning) -> str | None:
        """Begin or go on; returns the run's id."""
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri, artifacts = places(self.target)
        self._client = MlflowClient(tracking_uri=uri)
        if beginning.known_id is not None:
            self._id = beginning.known_id
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        known = None if experiment is None else experiment.experiment_id
        number = known or self._client.create_experiment(name, artifact_location=artifacts)
        self._id = str(self._client.create_run(number, run_name=beginning.name).info.run_id)
        params = [Param(plain(key), str(value)[:_MAX_LENGTH]) for key, value in beginning.settings.items()]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MAX_PARAMS])
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(plain(key), value, now, step) for key, value in values.items()]
        )

    def pictures(self, step: int, images: Images) -> None:
        """Send images."""
        for name, image in images.items():
            self._client.log_image(self._id, image, key=plain(name), step=step)

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def places(target: str) -> tuple[str, str | None]:
    """Tracking URI of what was asked for, and where artifacts lie (None: where the server says).

    A plain folder gets a database, since MLflow no longer writes runs as folders of files.
    """
    if "://" in target:
        return target, None
    folder = Path(target).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()


def plain(name: str) -> str:
    """A name of the characters that MLflow allows."""
    return re.sub(r"/+", "/", re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)).strip("/")[:250]
