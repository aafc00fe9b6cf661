"""Which labels and regions are scored, and what they are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mim3d.core.errors import ConfigError
from mim3d.core.settings import nearest
from mim3d.workflows.evaluate.scoring import label_name


@dataclass(frozen=True)
class Scored:
    """What is scored.

    Attributes:
        regions: name -> the label values it is made of, single labels included; empty where nothing is declared or
            chosen: then it is what the maps hold.
        labels: label value -> name, of every value in the regions.
        unions: those of the regions that were asked for as unions.
    """

    regions: Mapping[str, tuple[int, ...]]
    labels: Mapping[int, str]
    unions: Mapping[str, tuple[int, ...]]


def scored_names(
    declared: Mapping[int, str],
    labels: Sequence[str] | None,
    regions: Mapping[str, Sequence[int | str]],
) -> Scored:
    """Resolve names and values against the declared labels.

    Args:
        declared: label value -> name, possibly with the background.
        labels: names or values to score; None for every declared one, or for none beside regions.
        regions: unions to score: name -> values or names.

    Raises:
        ConfigError: a label that is not declared, an empty region, or one name for two things.
    """
    known = _distinct({value: name for value, name in declared.items() if value != 0})
    unions = {name: _members(name, members, known) for name, members in regions.items()}
    unasked = {} if unions else known
    chosen = unasked if labels is None else _chosen(labels, known)
    twice = unions.keys() & set(chosen.values())
    if twice:
        raise ConfigError(f"regions and labels both hold {sorted(twice)[0]!r}; give the region another name.")
    values = sorted({value for members in unions.values() for value in members} - chosen.keys())
    return Scored(
        regions={**unions, **{name: (value,) for value, name in chosen.items()}},
        labels={**chosen, **{value: known.get(value, label_name(value)) for value in values}},
        unions=unions,
    )


def chosen_lesions(lesions: bool | Sequence[str], names: Sequence[str]) -> frozenset[str] | None:
    """Names whose lesions are scored; None for all.

    Raises:
        ConfigError: a name that is not scored.
    """
    if isinstance(lesions, bool):
        return None
    if not names:
        raise ConfigError("lesions names labels, but none is declared; name them with --labels too, or use true.")
    for name in lesions:
        if name not in names:
            raise ConfigError(f"lesions holds {name!r}, which is not scored.{nearest(name, names)}")
    return frozenset(lesions)


def _distinct(names: Mapping[int, str]) -> dict[int, str]:
    """The same names, followed by their value where two labels share one: a table needs one row each."""
    every = list(names.values())
    return {value: name if every.count(name) == 1 else f"{name}_{value}" for value, name in names.items()}


def _chosen(labels: Sequence[str], declared: Mapping[int, str]) -> dict[int, str]:
    """Value -> name of the labels asked for, by name or value; any value where nothing is declared."""
    values = [_value("labels", label, declared) for label in labels]
    if not values:
        raise ConfigError("labels is empty; name the labels to score, or leave it out to score every one.")
    return {value: declared.get(value, label_name(value)) for value in values}


def _members(region: str, members: Sequence[int | str], declared: Mapping[int, str]) -> tuple[int, ...]:
    if not members:
        raise ConfigError(f"regions.{region} is empty; name the labels that it is made of.")
    return tuple(dict.fromkeys(_value(f"regions.{region}", member, declared) for member in members))


def _value(where: str, label: int | str, declared: Mapping[int, str]) -> int:
    text = str(label)
    named = [value for value, name in declared.items() if name == text]
    if named:
        return named[0]
    value = int(text) if text.isdigit() else 0
    if value in declared or (value > 0 and not declared):
        return value
    known = nearest(text, declared.values()) if declared else " None is: give values from 1."
    raise ConfigError(f"{where} holds {text!r}, which is not declared.{known}")
