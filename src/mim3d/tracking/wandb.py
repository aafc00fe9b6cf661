"""Weights & Biases, with or without network (``WANDB_MODE=offline``)."""

from collections.abc import Mapping
from typing import Any

from mim3d.tracking.tracker import Images, SessionInfo

_INIT_TIMEOUT_S = 30


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
            config=dict(session.settings),
            # The command's own output is no concern of the tracker's; without network, training waits no longer.
            settings=wandb.Settings(console="off", init_timeout=_INIT_TIMEOUT_S),
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
