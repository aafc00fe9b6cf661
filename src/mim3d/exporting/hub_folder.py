"""A network as a folder that can be pushed to Hugging Face as it is, with a README, and that mim3d reads back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import mim3d
from mim3d.backbones.contract import size_text
from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json, write_text
from mim3d.exporting.description import formula, millimetres
from mim3d.exporting.networks import Exported
from mim3d.tasks import TASKS
from mim3d.weights import save_network

#: Ids of licences as Hugging Face spells them.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

_LOADING_ENCODER = """```python
import mim3d
encoder = mim3d.load_encoder("PATH_OR_OWNER/NAME")     # a local folder, or the id of this repository
maps = encoder.feature_maps(volume)                    # (B, C, X, Y, Z) float32, mapped as above; finest map first
```

```
mim3d finetune --data DATA --out runs/mine --weights PATH_OR_OWNER/NAME
```"""

_LOADING_TASK = """```
mim3d predict --weights PATH_OR_OWNER/NAME --input SCANS --out predictions{task}
```

`mim3d.load_encoder("PATH_OR_OWNER/NAME")` gives its encoder alone."""


def check_license(license: str | None) -> None:
    """Refuse what is no id of a licence.

    Raises:
        ConfigError: It has capitals, spaces or the like.
    """
    if license is not None and _LICENSE.fullmatch(license) is None:
        raise ConfigError(
            f"license is '{license}'; give an id in small letters as Hugging Face lists them, such as apache-2.0, "
            "cc-by-4.0 or other."
        )


def write_hub_folder(network: Exported, folder: Path, seen: Path | None) -> None:
    """Write ``model.safetensors``, ``card.json``, ``config.json`` and ``README.md`` into a folder.

    Args:
        network: The network.
        folder: Folder to write to; it exists and is empty.
        seen: The list of scans that the network learned from, to be published too; None leaves it out.
    """
    card = network.card
    own = {key: value for key, value in card.items() if key != "format"}
    save_network(folder, network.module, own, beside=[] if seen is None else [seen])
    # What programs that know Hugging Face look for: the library and the architecture with its sizes.
    config = {
        "library_name": "mim3d",
        "model_type": "mim3d",
        "network": network.kind,
        "backbone": card.get("backbone"),
        "in_channels": network.num_channels,
        "input_size": None if network.form.input_size is None else list(network.form.input_size),
        "id2label": {str(number): name for number, name in enumerate(network.form.channels)},
        "mim3d_version": card.get("mim3d_version"),
    }
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", model_card(network, has_seen=seen is not None))


def model_card(network: Exported, *, has_seen: bool) -> str:
    """Return the README: Markdown with YAML front matter, as Hugging Face reads it; no patients, no paths.

    Args:
        network: The network.
        has_seen: Whether the list of scans that it learned from lies beside it.
    """
    front_matter = {
        **({} if network.license is None else {"license": network.license}),
        "library_name": "mim3d",
        "pipeline_tag": network.form.pipeline,
        "tags": ["mim3d", "medical-imaging", "3d", network.kind],
    }
    parts = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)}---",
        f"# {network.kind.capitalize()} made with mim3d",
        f"{network.form.purpose} Made with mim3d {network.card.get('mim3d_version', mim3d.__version__)}.",
        f"## Input\n\n{_table(_input_rows(network))}",
        *_results(network),
        f"## Training data\n\n{_data(network, has_seen)}",
        f"## Use\n\n{_loading(network)}\n\nHugging Face ids need `pip install 'mim3d[hub]'`. "
        "`card.json` holds all settings; the tensors in `model.safetensors` cannot run code.",
        "A research tool, no medical device.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(network: Exported) -> str:
    task = network.card.get("task")
    if network.kind == "encoder" or task is None:
        return _LOADING_ENCODER
    return _LOADING_TASK.format(task="" if task["name"] in TASKS else f" --task {task['name']}")


def _input_rows(network: Exported) -> dict[str, str]:
    card = network.card
    return {
        "modality": network.modality or "not recorded",
        "channels (images per scan)": str(network.num_channels),
        "orientation": str(card.get("orientation", "RAS+")),
        "voxel size": millimetres(card.get("spacing_mm"), "of each scan"),
        "intensities": formula(card.get("intensity")),
        **_view_rows(network),
        "sizes must be multiples of": _multiple(card),
    }


def _multiple(card: Mapping[str, Any]) -> str:
    """Return what sizes must be multiples of; older cards hold one edge for all axes."""
    known = card.get("input_multiple", card.get("patch_size"))
    if known is None:
        return "not recorded"
    return f"{size_text(tuple(known)) if isinstance(known, list) else known} voxels"


def _view_rows(network: Exported) -> dict[str, str]:
    """Return how much of a scan it sees at once; nothing where that is not recorded."""
    if network.form.input_size is None:
        return {}
    size = " x ".join(map(str, network.form.input_size)) + " voxels"
    box = network.form.box
    if box is None:
        return {"window": size}
    if box["voxel_mm"] is None:
        return {"box": f"the whole scan, brought to {size}"}
    middle = "the middle of the scan" if box["centre"] == "scan" else "the label's centre of mass"
    return {"box": f"{size} of {millimetres(box['voxel_mm'], '')} around {middle}"}


def _results(network: Exported) -> list[str]:
    parts = []
    if network.form.channels:
        named = {str(number): name for number, name in enumerate(network.form.channels)}
        parts.append(f"## Output\n\nChannels ({network.form.activation} gives probabilities):\n\n{_table(named)}")
    scores = network.card.get("scores") or {}
    if scores:
        rows = {name: f"{value:.4f}" for name, value in scores.items()}
        parts.append(
            "## Scores\n\nOf these weights on the cases held out in training, by which they were chosen; no test on "
            f"other data.\n\n{_table(rows)}"
        )
    return parts


def _data(network: Exported, has_seen: bool) -> str:
    digest = network.card.get("data_digest")
    first = "Its data are not recorded." if digest is None else f"Digest of the prepared scans: `{digest}`."
    if has_seen:
        return (
            f"{first} `seen.json` lists digests and coarse fingerprints of the scans it learned from, so that mim3d "
            "can warn when a held-out scan is among them."
        )
    return (
        f"{first} The list of scans it learned from is not published: whoever has a scan could tell from it whether "
        "it was among them. So mim3d cannot warn when a held-out scan was learned from; hold your test cases against "
        "the description of the data."
    )


def _table(rows: Mapping[str, str]) -> str:
    escaped = [(key.replace("|", "\\|"), value.replace("|", "\\|")) for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in escaped)])
