"""TensorBoard: event files in the run folder."""

from collections.abc import Mapping
from typing import Any

from mim3d.tracking.tracker import Images, SessionInfo

FOLDER = "tensorboard"


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
        text = "\n".join(f"    {name}: {value}" for name, value in session.settings.items())
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
