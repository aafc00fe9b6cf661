"""TensorBoard: event files in the run folder."""

from collections.abc import Mapping
from typing import Any

from mim3d.tracking.tracker import Beginning, Images

FOLDER = "tensorboard"


class TensorBoard:
    """Events in OUT/tensorboard; those that an interrupted session wrote after the resumed step are purged."""

    name = "tensorboard"
    target = FOLDER

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, beginning: Beginning) -> str | None:
        """Open a file of events."""
        from torch.utils import tensorboard

        writer_of: Any = tensorboard.SummaryWriter
        self._writer = writer_of(str(beginning.folder / FOLDER), purge_step=beginning.step + 1)
        # TensorBoard reads Markdown, in which an indented block stays as it is.
        text = "\n".join(f"    {name}: {value}" for name, value in beginning.settings.items())
        self._writer.add_text("settings", text, beginning.step)
        return None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers, at once: a kill must not lose what the checkpoint is ahead of."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, step: int, images: Images) -> None:
        """Write images."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HW")
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()
