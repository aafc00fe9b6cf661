"""A network as a folder that can be pushed to Hugging Face as it is, with a README, and that mim3d reads back."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

import mim3d
from mim3d.backbones import BACKBONES
from mim3d.backbones.contract import size_text
from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json, write_text
from mim3d.core.warned import checked_rows
from mim3d.exporting.networks import Exported, formula, millimetres, terms_of
from mim3d.exporting.origin import ENTRY, score_rows, stage_rows
from mim3d.reporting.rendering import render
from mim3d.tasks import TASKS
from mim3d.weights import save_network

#: Ids of licences as Hugging Face spells them.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class ListedScans:
    """What a published list of scans holds.

    Attributes:
        number: Number of scans.
        has_images: Whether it holds fingerprints, which are coarse images, or salted marks alone.
        by_digest: Number of scans that are known by the digest of their files alone.
    """

    number: int
    has_images: bool
    by_digest: int


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


def write_hub_folder(network: Exported, folder: Path, listed: ListedScans | None) -> None:
    """Write ``model.safetensors``, ``card.json``, ``config.json`` and ``README.md`` into a folder.

    Args:
        network: The network.
        folder: Folder to write to; it exists and is empty.
        listed: What the list of scans beside it holds, for the README; None where there is none.
    """
    card = network.card
    own = {key: value for key, value in card.items() if key != "format"}
    save_network(folder, network.module, own, remedy=None)
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
    write_json(folder / "config.json", config, remedy=None)
    write_text(folder / "README.md", model_card(network, listed), remedy=None)


def model_card(network: Exported, listed: ListedScans | None) -> str:
    """Return the README: Markdown with YAML front matter, as Hugging Face reads it; no patients, no paths.

    Args:
        network: The network.
        listed: What the list of scans that it learned from holds; None where none lies beside it.
    """
    card, form = network.card, network.form
    front_matter = {
        **({} if network.license is None else {"license": network.license}),
        "library_name": "mim3d",
        "pipeline_tag": form.pipeline,
        "tags": ["mim3d", "medical-imaging", "3d", network.kind],
    }
    # Code that is not mim3d's own is named by whoever uses it.
    names = {kind: card[kind]["name"] for kind in ("task", "backbone") if kind in card}
    own_code = {kind: name for kind, name in names.items() if name not in TASKS and name not in BACKBONES}
    return render(
        "hub_readme.md.jinja",
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        kind=network.kind,
        purpose=form.purpose,
        version=card.get("mim3d_version", mim3d.__version__),
        inputs=_input_rows(network),
        channels={str(number): name for number, name in enumerate(form.channels)},
        activation=form.activation,
        scores={name: f"{value:.4f}" for name, value in (card.get("scores") or {}).items()},
        warnings=checked_rows(card.get("warnings")),
        digest=card.get("data_digest"),
        terms=terms_of(network),
        stages=stage_rows(card.get(ENTRY) or ()),
        evaluation=score_rows(card.get("evaluation")),
        num_evaluated=(card.get("evaluation") or {}).get("num_cases"),
        listed=listed,
        own_code=own_code,
    )


def _input_rows(network: Exported) -> dict[str, str]:
    card, size, box = network.card, network.form.input_size, network.form.box
    view = {}
    if size is not None:
        voxels = " x ".join(map(str, size)) + " voxels"
        if box is None:
            view = {"window": voxels}
        elif box["voxel_mm"] is None:
            view = {"box": f"the whole scan, brought to {voxels}"}
        else:
            middle = "the middle of the scan" if box["centre"] == "scan" else "the label's centre of mass"
            view = {"box": f"{voxels} of {millimetres(box['voxel_mm'], '')} around {middle}"}
    # Older cards hold one edge for all axes.
    multiple = card.get("input_multiple", card.get("patch_size"))
    shown = size_text(tuple(multiple)) if isinstance(multiple, list) else multiple
    return {
        "modality": network.modality or "not recorded",
        "channels (images per scan)": str(network.num_channels),
        "orientation": str(card.get("orientation", "RAS+")),
        "voxel size": millimetres(card.get("spacing_mm"), "of each scan"),
        "intensities": formula(card.get("intensity")),
        **view,
        "sizes must be multiples of": "not recorded" if multiple is None else f"{shown} voxels",
    }
