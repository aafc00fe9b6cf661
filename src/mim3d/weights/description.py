"""What a file of weights is, in words: of which family, how large, how much of it an encoder takes, what it expects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mim3d.core.errors import listed
from mim3d.core.names import cut, number_of
from mim3d.weights.cards import seen_size
from mim3d.weights.families import ExpectedInput, RecognisedWeights, unknown_layout
from mim3d.weights.folders import RUN_NETWORKS, weights_file
from mim3d.weights.loading import fitting, recipe_of_card
from mim3d.weights.opened import OpenedWeights
from mim3d.weights.states import HeldWeights, unlearned

#: Entry of cards and manifests that holds where the foreign weights come from that training began with.
IN_CARD = "weights_origin"


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """Where foreign weights come from, and what their network expects.

    Attributes:
        family: Name of their family.
        source: Where it was published.
        licence: Terms of use; ``unknown`` where no one says them.
        commercial: False where the terms exclude commercial use.
        remark: What a user must know besides.
        expects: What the network expects of its input.
    """

    family: str
    source: str
    licence: str
    commercial: bool
    remark: str
    expects: ExpectedInput

    @classmethod
    def of(cls, found: RecognisedWeights) -> "WeightsOrigin":
        """The origin of weights of a known family."""
        family, own = found.family, found.held.beside.get("mim3d")
        if isinstance(own, Mapping):
            # Ours, exported in the layout of that family: not its authors' terms, but those of what it began with.
            card = own.get("card")
            began = cls.in_card(card) if isinstance(card, Mapping) else None
            return cls(
                family=f"mim3d, exported in the layout of {family.name}",
                source="mim3d export" if began is None else f"mim3d export; began with weights of {began.family}",
                licence=cut(str(own.get("license") or "unknown"), 200) if began is None else began.licence,
                commercial=began is None or began.commercial,
                remark="",
                expects=found.expects,
            )
        return cls(
            family=family.name,
            source=family.source,
            licence=family.licence,
            commercial=family.commercial,
            remark=family.remark,
            expects=found.expects,
        )

    @classmethod
    def in_card(cls, card: Mapping[str, Any]) -> "WeightsOrigin | None":
        """The foreign weights that a network began with, as its card says it; None where it says nothing.

        Anybody may have written the card. What their network expected is left out: the card says what this one does.
        """
        said = card.get(IN_CARD)
        if not isinstance(said, Mapping) or not all(isinstance(said.get(name), str) for name in ("family", "licence")):
            return None
        return cls(
            family=cut(said["family"], 80),
            source=cut(str(said.get("source", "unknown")), 200),
            licence=cut(said["licence"], 200),
            commercial=said.get("commercial") is not False,
            remark="",
            expects=ExpectedInput(),
        )

    @property
    def terms(self) -> str:
        """What a licence that is not commercial means for what is learned from the weights; empty for others."""
        if self.commercial:
            return ""
        return f"weights of {self.family}: {self.licence}; what is learned from them may be bound by these terms"

    def __str__(self) -> str:
        return f"{self.family}; its network expects {self.expects}"


@dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """What a file of weights is.

    Attributes:
        file: The file.
        family: Name of the family; ``mim3d`` for our own, empty where none is known.
        rows: All that is known, in words, by what it is of; in order.
        origin: Where foreign weights come from; None for our own and for unknown ones.
        card: The card of our own weights; empty for foreign ones.
    """

    file: str
    family: str
    rows: Mapping[str, str]
    origin: WeightsOrigin | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(f"{name:<{width}}  {said}" for name, said in self.rows.items())


def origin_of(path: str | Path | OpenedWeights, networks: tuple[str, ...] = RUN_NETWORKS) -> WeightsOrigin | None:
    """Where foreign weights come from; None for our own, and for those of no known family.

    Args:
        path: A run, an export folder, a weights file or a Hugging Face id; or weights that are opened.
        networks: Folders of a run to look for, the preferred first.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    found = OpenedWeights.of(path, networks).found
    return None if found is None else WeightsOrigin.of(found)


def describe(path: str | Path) -> WeightsDescription:
    """What a file of weights is: family, network, size, coverage, expected input and licence, as far as it is known.

    Args:
        path: A run, an export folder, a weights file or a Hugging Face id.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    weights = OpenedWeights(path)
    file, held = str(weights_file(path)), weights.held
    if card := weights.card:
        return WeightsDescription(file=file, family="mim3d", rows=_of_card(path, file, held, card), card=card)
    found = weights.found
    rows = {"file": file}
    if found is None:
        rows |= {"family": f"unknown: {unknown_layout(held)}", "size": _size(held), "found": _place(held)}
        return WeightsDescription(file=file, family="", rows=rows)
    origin = WeightsOrigin.of(found)
    rows |= {"family": origin.family, "source": origin.source, "licence": origin.licence}
    rows |= {**_network(found), "size": _size(held), "found": _place(held)}
    rows |= {f"expects {name}": said for name, said in origin.expects.rows().items()}
    if origin.remark:
        rows["note"] = origin.remark
    if said := unlearned(found.tensors):
        rows["values"] = f"cannot be used: it holds {said}"
    return WeightsDescription(file=file, family=origin.family, rows=rows, origin=origin)


def _network(found: RecognisedWeights) -> dict[str, str]:
    """The network of a known family and how much of it the file fills, or why no encoder can be made of the file."""
    if found.unfit:
        return {"network": f"none of mim3d's{found.unfit}"}
    open_ = found.open
    said = f"{found.family.backbone}: {found.size}"
    if open_:
        flags = listed([f"--backbone.{name}" for name in open_])
        said += f"; give {flags}, which its tensors do not show"
    target, inside = found.own_network, found.encoder
    _, report = fitting(target, inside)
    others = len(found.tensors) - len(inside)
    millions = sum(value.numel() for value in target.values()) / 1e6
    return {
        "network": said,
        "encoder": f"{millions:.3g} M values; {report}, and {number_of(others, 'tensor')} of other parts",
    }


def _size(held: HeldWeights) -> str:
    tensors = held.tensors.values()
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in tensors})
    total = sum(value.numel() for value in tensors)
    return f"{number_of(len(held.tensors), 'tensor')}, {total:,} values ({', '.join(kinds)})"


def _place(held: HeldWeights) -> str:
    place = f"under {'.'.join(held.place)}" if held.place else "at the top of the file"
    return f"{place}, each name behind {held.prefix}" if held.prefix else place


def _of_card(path: str | Path, file: str, held: HeldWeights, card: Mapping[str, Any]) -> dict[str, str]:
    """What our own card says: the network, what it does, and how its input is made."""
    named = card["backbone"]
    settings = ", ".join(f"{name} {value}" for name, value in named.items() if name != "name")
    rows = {"file": file, "family": f"mim3d {card.get('mim3d_version', 'of an unknown version')}"}
    rows["network"] = f"{named['name']}{f': {settings}' if settings else ''}"
    if named["name"].partition(".")[1] == "":
        with torch.device("meta"):
            target = recipe_of_card(card, path).build().state_dict()
        encoder = {name: value for name, value in held.tensors.items() if name.startswith("encoder.")}
        inside = {name.removeprefix("encoder."): value for name, value in (encoder or held.tensors).items()}
        _, report = fitting(target, inside)
        others = len(held.tensors) - len(inside)
        rest = f", and {number_of(others, 'tensor')} of other parts" if others else ""
        rows["encoder"] = f"{sum(value.numel() for value in target.values()) / 1e6:.3g} M values; {report}{rest}"
    rows |= {"size": _size(held), "found": _place(held)}
    if "task" in card:
        rows["task"] = f"{card['task']['name']}, labels: {', '.join(card.get('labels', {}).values()) or 'none'}"
    spacing, intensity = card.get("spacing_mm"), card.get("intensity")
    rows["expects voxel size"] = "of each scan" if spacing is None else f"{' x '.join(map(str, spacing))} mm"
    rows["expects orientation"] = str(card.get("orientation", "unknown"))
    rows["expects intensities"] = "unknown" if intensity is None else _mapped(intensity)
    rows["expects channels"] = ", ".join(card.get("channel_names") or []) or str(named.get("in_channels", 1))
    if (origin := WeightsOrigin.in_card(card)) is not None:
        rows["began with"] = f"{origin.family}; licence: {origin.licence}"
    for name in ("step", "scores", "warnings"):
        if card.get(name):
            rows[name] = _plain(card[name])
    if (size := seen_size(card)) is not None:
        rows["learned from crops"] = f"{' x '.join(map(str, size))} voxels"
    return rows


def _mapped(intensity: Mapping[str, Any]) -> str:
    if intensity["kind"] == "zscore":
        return "z-score of each scan"
    return f"{' to '.join(f'{bound:g}' for bound in intensity['window'])} mapped to 0 to 1"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {one:.4g}" if isinstance(one, float) else f"{name} {one}" for name, one in value.items()
        )
    if isinstance(value, list):
        return "; ".join(str(one.get("text", one)) if isinstance(one, dict) else str(one) for one in value)
    return str(value)
