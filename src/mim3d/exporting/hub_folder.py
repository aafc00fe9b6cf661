"""A network as a folder that can be pushed to Hugging Face as it is, and that mim3d reads back."""

import re
from pathlib import Path
from typing import Any

from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json, write_text
from mim3d.exporting.model_card import model_card
from mim3d.exporting.networks import Exported
from mim3d.weights import save_network

README_NAME = "README.md"
CONFIG_NAME = "config.json"

#: Ids of licences as Hugging Face spells them.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_license(license: str | None) -> None:
    """Refuse what is no id of a licence.

    Raises:
        ConfigError: it has capitals, spaces or the like.
    """
    if license is not None and _LICENSE.fullmatch(license) is None:
        raise ConfigError(
            f"license is '{license}'; give an id in small letters as Hugging Face lists them, such as apache-2.0, "
            "cc-by-4.0 or other."
        )


def write_hub_folder(
    network: Exported, folder: Path, *, license: str | None, modality: str | None, seen: Path | None
) -> None:
    """Write ``model.safetensors``, ``card.json``, ``config.json`` and ``README.md`` into a folder.

    Args:
        network: the network.
        folder: where to; it exists and is empty.
        license: id of the licence of the weights.
        modality: what the scans are.
        seen: the list of scans that it learned from, to be published too; None leaves it out.
    """
    card = {key: value for key, value in network.card.items() if key != "format"}
    save_network(folder, network.module, card, beside=[] if seen is None else [seen])
    write_json(folder / CONFIG_NAME, _config(network))
    text = model_card(network, license=license, modality=modality, has_seen=seen is not None)
    write_text(folder / README_NAME, text)


def _config(network: Exported) -> dict[str, Any]:
    """What programs that know Hugging Face look for: the library and the architecture with its sizes."""
    card = network.card
    return {
        "library_name": "mim3d",
        "model_type": "mim3d",
        "network": network.kind,
        "backbone": card.get("backbone"),
        "in_channels": network.num_channels,
        "input_size": None if network.form.input_size is None else list(network.form.input_size),
        "id2label": {str(number): name for number, name in enumerate(network.form.channels)},
        "mim3d_version": card.get("mim3d_version"),
    }
