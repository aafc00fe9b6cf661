"""Lists that say which labels a map has annotations of, on their way into a cache and back."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.cache import open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_cases
from tests.labelled import write_ball_set


@pytest.fixture(scope="module")
def ball_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Decathlon folder of three scans."""
    return write_ball_set(tmp_path_factory.mktemp("data") / "balls", num_cases=3)


def rows(data: Path) -> list[dict[str, object]]:
    names = [(f"{data}/imagesTr/ball_{index}.nii.gz", f"{data}/labelsTr/ball_{index}.nii.gz") for index in range(3)]
    return [{"image": image, "label": label} for image, label in names]


def test_a_csv_list_names_annotated_labels_separated_by_semicolons(ball_set: Path, tmp_path: Path):
    lines = ["image,label,labels"]
    lines += [
        f"{row['image']},{row['label']},{text}" for row, text in zip(rows(ball_set), ["", "2", " 2 ; 5"], strict=True)
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    assert [case.labelled for case in read_cases(tmp_path / "list.csv").cases] == [None, ("2",), ("2", "5")]
    images = read_cases(tmp_path / "list.csv", recursive_images_only=True)
    assert all(case.labelled is None for case in images.cases)


def test_a_json_list_names_them_too(ball_set: Path, tmp_path: Path):
    items = rows(ball_set)
    items[0]["labels"], items[1]["labels"] = ["ball"], "ball;core"
    (tmp_path / "list.json").write_text(json.dumps({"labels": {"ball": 2, "core": 5}, "cases": items}))
    found = [case.labelled for case in read_cases(tmp_path / "list.json").cases]
    assert found == [("ball",), ("ball", "core"), None]


def test_a_cache_keeps_them_and_changes_its_digest_when_they_change(ball_set: Path, tmp_path: Path):
    cases = read_cases(ball_set)
    whole = build_cache(cases, tmp_path / "cache", Preprocessing()).digest
    part = tuple(replace(case, labelled=("ball",) if index else None) for index, case in enumerate(cases.cases))
    build_cache(replace(cases, cases=part), tmp_path / "cache", Preprocessing())
    cache = open_cache(tmp_path / "cache")
    assert [scan.case.labelled for scan in cache] == [None, *[("ball",)] * (len(part) - 1)]
    assert cache.digest != whole
    build_cache(cases, tmp_path / "cache", Preprocessing())
    assert open_cache(tmp_path / "cache").digest == whole


def test_a_manifest_from_before_there_were_such_lists_is_read_as_annotated_in_full(ball_set: Path, tmp_path: Path):
    build_cache(read_cases(ball_set), tmp_path / "cache", Preprocessing())
    path = next((tmp_path / "cache").glob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["labelled"]), path)
    assert all(scan.case.labelled is None for scan in open_cache(tmp_path / "cache"))
    pq.write_table(table.drop_columns(["patient"]), path)
    with pytest.raises(DataError, match="no column 'patient'"):
        open_cache(tmp_path / "cache")
