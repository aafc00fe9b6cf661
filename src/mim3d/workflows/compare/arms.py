"""The arms of a comparison: what each begins with, said in a word or a mapping, and whether two are the same."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mim3d.backbones import BACKBONES, Backbone, create_recipe
from mim3d.core.errors import ConfigError
from mim3d.core.names import cut, printable
from mim3d.core.own_code import is_dotted_path
from mim3d.core.settings import nearest, overlay, parse_yaml, to_named
from mim3d.core.types import Named
from mim3d.methods import METHODS, Method, create_method
from mim3d.weights import is_hub_id, locate, weights_digest
from mim3d.workflows.shared.initialisation import DEFAULT_BACKBONE, asked_recipe

SCRATCH = "scratch"

#: Keys of an arm that is written as a mapping.
KEYS = ("name", "method", "weights", "backbone")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: a network from scratch, pre-trained by a method, or with weights that are there.

    Attributes:
        name: Name in tables and files.
        method: Pre-training method with its settings; None where nothing is pre-trained.
        weights: Weights that are there, by an absolute path; None for none.
        backbone: The encoder; None takes that of the weights.
    """

    name: str
    method: dict[str, Any] | None = None
    weights: str | None = None
    backbone: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """What it begins with, in a word or two."""
        return "pre-trained" if self.method else "weights" if self.weights else "from scratch"

    def recipe(self) -> Backbone:
        """Settings of its encoder.

        Raises:
            ConfigError: An unknown backbone or setting.
            CheckpointError: Weights from which no settings can be read.
        """
        return asked_recipe(self.backbone, self.weights)[0]

    def created_method(self) -> Method | None:
        """Settings of its method.

        Raises:
            ConfigError: An unknown method or setting.
        """
        return None if self.method is None else create_method(self.method, self.backbone or "")

    def identity(self) -> dict[str, Any]:
        """All that its results follow from, its name left out."""
        method = self.created_method()
        return {
            "method": None if method is None else to_named(method, METHODS),
            "weights": None if self.weights is None else weights_digest(self.weights),
            "backbone": to_named(self.recipe(), BACKBONES),
        }


def read_arms(
    given: Sequence[str | dict[str, Any]], backbone: Named | None, method: Named | None, num_channels: int
) -> list[Arm]:
    """The arms that are asked for.

    Args:
        given: Words or mappings.
        backbone: Encoder of those that name none.
        method: Settings of a method in the recipe of pre-training, which lie below those of arms of that method.
        num_channels: Input channels of the data set.

    Raises:
        ConfigError: Fewer than two arms, one that cannot be understood or built, or two that are the same.
        CheckpointError: Weights that cannot be read.
    """
    if len(given) < 2:
        raise ConfigError(
            f"arms has {len(given)} of the at least two that a comparison takes, such as scratch and MiM."
        )
    arms = [_read_arm(each, backbone, method, num_channels) for each in given]
    names: dict[str, Arm] = {}
    known: dict[str, str] = {}
    for arm in arms:
        if arm.name in names:
            raise ConfigError(f"Two arms are called '{arm.name}'; give one of them another name, as {{name: ...}}.")
        try:
            # Told before a scan is read.
            if (own := arm.created_method()) is not None:
                own.check_backbone(arm.recipe())
            key = json.dumps(arm.identity(), sort_keys=True)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from error
        if key in known:
            raise ConfigError(f"The arms '{known[key]}' and '{arm.name}' are the same; leave one of them out.")
        names[arm.name], known[key] = arm, arm.name
    return arms


def _read_arm(given: str | dict[str, Any], backbone: Named | None, method: Named | None, num_channels: int) -> Arm:
    content = given if isinstance(given, dict) else _of_word(given)
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"arm {cut(str(given))} has no key '{cut(str(key))}'.{nearest(str(key), KEYS)}")
    if content.get("method") is not None and content.get("weights") is not None:
        raise ConfigError(f"arm {cut(str(given))} has a method and weights; give one of them, or two arms.")
    own_method, weights = _named(content.get("method")), content.get("weights")
    own_backbone = _named(content.get("backbone"))
    if own_method is not None:
        own_method = overlay(_named(method), own_method) if method is not None else own_method
        if "name" not in own_method:
            raise ConfigError(f"arm {cut(str(given))} has settings of a method without its name; add name: METHOD.")
    if weights is not None:
        locate(str(weights))
        weights = str(weights) if is_hub_id(str(weights)) else os.path.abspath(str(weights))
    else:
        below = {"in_channels": num_channels, **(_named(backbone) or {"name": DEFAULT_BACKBONE})}
        own_backbone = below if own_backbone is None else overlay(below, {"in_channels": num_channels, **own_backbone})
    name = printable(str(content.get("name") or _default_name(own_method, weights, _named(content.get("backbone")))))
    return Arm(name=name, method=own_method, weights=weights, backbone=own_backbone)


def _of_word(word: str) -> dict[str, Any]:
    """The mapping that a word stands for.

    Raises:
        ConfigError: It stands for nothing; the nearest known name is offered.
    """
    if word.startswith("{"):
        content: Any = parse_yaml(word, "--arms")
        if isinstance(content, dict):
            return content
    first, colon, second = word.partition(":")
    rest = {"backbone": second, "name": word} if colon else {}
    if first == SCRATCH:
        return rest
    if first in METHODS:
        return {"method": first, **rest}
    if word in BACKBONES:
        return {"backbone": word}
    if os.path.exists(word) or word.startswith("hf://"):
        return {"weights": word}
    if is_dotted_path(first):
        # A user's own code says itself what it is.
        return {"method": first, **rest} if _is_method(first) else {"backbone": first, "name": word}
    known = [SCRATCH, *METHODS, *BACKBONES]
    raise ConfigError(f"arm '{cut(word)}' is no method, no backbone and no path of weights.{nearest(first, known)}")


def _is_method(path: str) -> bool:
    try:
        create_recipe(path)
    except ConfigError:
        return True
    return False


def _named(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{cut(repr(value))} is no name and no mapping with a name and settings.")
    return dict(value)


def _default_name(method: dict[str, Any] | None, weights: str | None, backbone: dict[str, Any] | None) -> str:
    first = str(method["name"]) if method else os.path.basename(weights) if weights else SCRATCH
    if backbone is None or "name" not in backbone:
        return first
    return str(backbone["name"]) if first == SCRATCH else f"{first}:{backbone['name']}"
