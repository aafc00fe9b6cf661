"""Settings: strict coercion, names, YAML, durations."""

import dataclasses
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.settings import (
    build_settings,
    flat,
    nearest,
    parse_duration,
    parse_yaml,
    read_yaml,
    resolve,
    to_mapping,
    update_settings,
    write_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Level:
    size: tuple[int, int, int]
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    levels: tuple[Level, ...] = (Level(size=(1, 2, 3)),)
    temperature: float | None = None
    kind: Literal["window", "zscore"] = "window"
    num_steps: int = 3
    resume: bool = False
    first: Level = Level(size=(1, 1, 1))
    names: list[str] = dataclasses.field(default_factory=list)
    labels: dict[int, str] = dataclasses.field(default_factory=dict)
    folder: Path = Path(".")

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; give at least 1.")


REGISTRY: dict[str, Any] = {
    "Plan": Plan,
    "short": Plan(num_steps=1, first=Level(size=(4, 4, 4), ratio=0.25)),
    "made": lambda: Plan(num_steps=2),
    "lazy": "fractions:Fraction",
}


def test_build_settings_turns_words_into_the_types_of_the_fields():
    plan = build_settings(
        Plan,
        {
            "levels": [{"size": ["1", "2", "3"], "ratio": "1e-3"}],
            "temperature": "2",
            "kind": "zscore",
            "num_steps": "4",
            "resume": "true",
            "names": "one",
            "labels": {"1": "liver"},
            "folder": "a/b",
        },
        "plan",
    )
    assert plan == Plan(
        levels=(Level(size=(1, 2, 3), ratio=0.001),),
        temperature=2.0,
        kind="zscore",
        num_steps=4,
        resume=True,
        names=["one"],
        labels={1: "liver"},
        folder=Path("a/b"),
    )
    assert isinstance(plan.temperature, float)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temprature": 1}, "plan has no setting 'temprature'. Did you mean 'temperature'?"),
        ({"temperature": "warm"}, "plan.temperature is 'warm', but it takes a number or null."),
        ({"num_steps": 1.5}, "plan.num_steps is 1.5, but it takes a whole number."),
        ({"num_steps": True}, "plan.num_steps is True, but it takes a whole number."),
        ({"kind": "windw"}, "plan.kind is 'windw'. Did you mean 'window'?"),
        ({"levels": [{"size": [1, 2]}]}, "plan.levels[0].size has 2 values ([1, 2]), but it takes 3."),
        ({"levels": [{}]}, "plan.levels[0].size is required; give it a value."),
        ({"first": {"sice": 1}}, "plan.first has no setting 'sice'. Did you mean 'size'?"),
        ({"first": 3}, "plan.first is 3, but it takes a mapping of settings."),
        ({"resume": "maybe"}, "plan.resume is 'maybe', but it takes true or false."),
        ({"names": [1]}, "plan.names[0] is 1, but it takes text."),
        ({"num_steps": 0}, "plan: num_steps is 0; give at least 1."),
    ],
)
def test_build_settings_refuses_with_key_value_and_remedy(values, sentence):
    with pytest.raises(ConfigError) as refused:
        build_settings(Plan, values, "plan")
    assert str(refused.value) == sentence


def test_null_clears_an_optional_setting():
    assert build_settings(Plan, {"temperature": "null"}, "plan").temperature is None


def test_update_settings_changes_only_the_nested_keys_it_names():
    changed = update_settings(REGISTRY["short"], {"first": {"ratio": 0.75}}, "plan")
    assert changed.first == Level(size=(4, 4, 4), ratio=0.75)
    assert changed.num_steps == 1


def test_nearest_offers_one_close_name_whatever_its_case_and_else_all():
    assert nearest("mim", ["MAE", "MiM", "VoCo"]) == " Did you mean 'MiM'?"
    assert nearest("qqqqq", ["b", "a"]) == " Known: a, b."
    assert nearest("x", []) == ""


def test_resolve_knows_types_presets_functions_and_instances():
    assert resolve("Plan", REGISTRY, "plan") == Plan()
    assert resolve({"name": "short", "first": {"ratio": "0.9"}}, REGISTRY, "plan").first == Level(
        size=(4, 4, 4), ratio=0.9
    )
    assert resolve("made", REGISTRY, "plan").num_steps == 2
    ready = Plan(num_steps=9)
    assert resolve(ready, REGISTRY, "plan") is ready


def test_resolve_imports_a_registered_string_only_when_asked():
    registry = {"Level": f"{__name__}:Level", "absent": "no_such_module:Thing"}
    assert resolve({"name": "Level", "size": [1, 2, 3]}, registry, "level").size == (1, 2, 3)


def test_resolve_takes_the_dotted_path_of_a_users_own_settings(tmp_path, monkeypatch):
    (tmp_path / "lab_settings.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True, kw_only=True)\nclass Own:\n    size: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve({"name": "lab_settings.Own", "size": "5"}, {}, "method").size == 5


def test_resolve_never_calls_or_imports_what_it_should_not(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('sprung').touch()\n"
        "def call():\n    pathlib.Path(__file__).with_name('called').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"There is no method 'trap\.call'"):
        resolve("trap.call", {"MiM": Plan}, "method", allow_import=False)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ConfigError, match="is no dataclass of settings"):
        resolve("trap.call", {}, "method")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("plann", r"There is no plan 'plann'\. Did you mean 'Plan'\?"),
        ({"size": 3}, "takes a name, or a mapping with a name"),
        (7, "plan is 7"),
        ("no_such_lab.Foo", r"plan 'no_such_lab\.Foo' cannot be imported"),
        ("dataclasses.Foo", r"cannot be imported"),
        ("..Foo", r"There is no plan '\.\.Foo'"),
    ],
)
def test_resolve_refuses_unknown_names(named, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(named, REGISTRY, "plan")


def test_yaml_is_read_as_people_mean_it(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "rate: 1e-3\ntime: 12:30\nname: no\nday: 2024-01-01\nid: 007\nlist: [1, 2.5, -3]\nempty:\nflag: true\n"
    )
    assert read_yaml(path) == {
        "rate": 0.001,
        "time": "12:30",
        "name": "no",
        "day": "2024-01-01",
        "id": "007",
        "list": [1, 2.5, -3],
        "empty": None,
        "flag": True,
    }


#: A few hundred bytes that stand for a thousand million values.
LAUGHS = "a: &a [1]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 8)}]\n" for p, n in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\na: 2\n", "'a' is given twice .line 2"),
        ("- 1\n", "holds no mapping"),
        ("1: 2\n", "holds no mapping"),
        ("a: [\n", "is no valid YAML"),
        ("? [1, 2]\n: 3\n", "a key must be a name"),
        ("a: !!python/object/apply:os.system ['true']\n", "is no valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply|is no valid YAML"),
        ("a: " + "1" * 5000, "is no valid YAML: Exceeds the limit"),
        ("a: !!int abc\n", "is no valid YAML: invalid literal"),
        ("a: !!bool maybe\n", "is no valid YAML"),
        ("a: !!timestamp foo\n", "the tag 'timestamp' is none that settings have there"),
        ("? !!set {a}\n: 1\n", "the tag 'set' is none"),
        ("a: !!map [b]\n", "the tag 'map' is none"),
        ("a: &a [*a]\n", "values are repeated too often"),
        (LAUGHS, "values are repeated too often"),
    ],
)
def test_read_yaml_refuses_in_one_sentence_with_the_file(tmp_path, text, sentence):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_values_that_are_repeated_by_name_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &size [1, 2]\nb: *size\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_a_value_of_a_hundred_thousand_letters_makes_no_sentence_of_them():
    for build in (
        lambda: build_settings(Plan, {"num_steps": "a" * 100_000}, "plan"),
        lambda: build_settings(Plan, {"a" * 100_000: 1}, "plan"),
        lambda: resolve("a" * 100_000, REGISTRY, "plan"),
    ):
        with pytest.raises(ConfigError) as refused:
            build()
        assert len(str(refused.value)) < 1000 and "aaaa" in str(refused.value)


def test_read_yaml_refuses_what_is_no_text_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "binary")


def test_settings_survive_the_way_through_yaml(tmp_path):
    plan = Plan(temperature=1e-5, names=["1e-3", "12:30", "no", "null"], labels={1: "liver"})
    write_yaml(tmp_path / "plan.yaml", to_mapping(plan))
    assert build_settings(Plan, read_yaml(tmp_path / "plan.yaml"), "plan") == plan


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)


@given(st.dictionaries(st.text(min_size=1, max_size=8), scalars | st.lists(scalars, max_size=3), max_size=4))
def test_every_mapping_of_scalars_and_lists_reads_back_as_written(tmp_path_factory, mapping):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    write_yaml(path, mapping)
    assert read_yaml(path) == mapping


def test_write_yaml_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    write_yaml(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="could not be written"):
        write_yaml(path, {"a": 2})
    assert path.read_text() == "a: 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.yaml"]


def test_write_yaml_says_when_there_can_be_no_folder_and_leaves_files_readable(tmp_path):
    write_yaml(tmp_path / "a.yaml", {})
    with pytest.raises(DataError, match="could not be written"):
        write_yaml(tmp_path / "a.yaml" / "b.yaml", {})
    assert stat.S_IMODE((tmp_path / "a.yaml").stat().st_mode) & stat.S_IRUSR


def test_to_mapping_gives_plain_values():
    assert to_mapping({"a": (1, Path("x")), "b": np.float32(0.5), "c": {3, 1}, "d": np.arange(2)}) == {
        "a": [1, "x"],
        "b": 0.5,
        "c": [1, 3],
        "d": [0, 1],
    }


@pytest.mark.parametrize(("text", "seconds"), [("01:30", 5400.0), ("00:00:05", 5.0), ("100:00", 360000.0)])
def test_durations_are_hours_minutes_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "1:75", "1h", "", "00:00", "-1:00"])
def test_other_durations_are_refused(text):
    with pytest.raises(ConfigError, match="Duration"):
        parse_duration(text)


def test_a_piece_of_yaml_names_its_place_when_it_is_wrong():
    assert parse_yaml("{name: MiM, rate: 1e-3}", "--method") == {"name": "MiM", "rate": 0.001}
    with pytest.raises(ConfigError, match="--method is no valid YAML"):
        parse_yaml("{name: ", "--method")


def test_settings_are_flattened_by_dotted_key():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
