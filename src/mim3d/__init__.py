"""mim3d: masked pre-training and fine-tuning for 3-D medical images.

The commands of the command line are functions here under the same names and with the same arguments:
``mim3d.pretrain(data=..., out=...)``. Only ``weights`` is a room here, as which it has :func:`mim3d.weights.describe`.
Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "phantom": "mim3d.commands.phantom",
    "cache": "mim3d.commands.cache",
    "pretrain": "mim3d.commands.pretrain",
    "finetune": "mim3d.commands.finetune",
    "predict": "mim3d.commands.predict",
    "embed": "mim3d.commands.embed",
    "evaluate": "mim3d.commands.evaluate",
    "export": "mim3d.commands.export",
    "probe": "mim3d.commands.probe",
    "compare": "mim3d.commands.compare",
    "report": "mim3d.commands.report",
    "models": "mim3d.commands.models",
    "create_model": "mim3d.backbones",
    "list_models": "mim3d.backbones",
    "load_encoder": "mim3d.weights",
    "load_scan": "mim3d.inference.scan_input",
    "ScanArray": "mim3d.workflows.embed.arrays",
    "CachedDataset": "mim3d.loading.monai_dataset",
    "open_cache": "mim3d.caching.cache",
}

_ROOMS = ("backbones", "caching", "datasets", "metrics", "weights")

__all__ = [
    "CachedDataset",
    "ScanArray",
    "__version__",
    "cache",
    "compare",
    "create_model",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "list_models",
    "load_encoder",
    "load_scan",
    "models",
    "open_cache",
    "phantom",
    "predict",
    "pretrain",
    "probe",
    "report",
]

if TYPE_CHECKING:
    from mim3d.backbones import create_model, list_models
    from mim3d.caching.cache import open_cache
    from mim3d.commands.cache import cache
    from mim3d.commands.compare import compare
    from mim3d.commands.embed import embed
    from mim3d.commands.evaluate import evaluate
    from mim3d.commands.export import export
    from mim3d.commands.finetune import finetune
    from mim3d.commands.models import models
    from mim3d.commands.phantom import phantom
    from mim3d.commands.predict import predict
    from mim3d.commands.pretrain import pretrain
    from mim3d.commands.probe import probe
    from mim3d.commands.report import report
    from mim3d.inference.scan_input import load_scan
    from mim3d.loading.monai_dataset import CachedDataset
    from mim3d.weights import load_encoder
    from mim3d.workflows.embed.arrays import ScanArray


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mim3d.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mim3d' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
