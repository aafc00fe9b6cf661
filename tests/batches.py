"""Batches of a loader, to be compared."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor


def on_cpu(batches: Iterator[dict[str, Any]], number: int) -> list[dict[str, Tensor]]:
    """The next batches as the objective sees them, in memory of their own; the iterator is closed."""
    found = [{key: value.to("cpu").clone() for key, value in batch.items()} for batch in islice(batches, number)]
    batches.close()
    return found
