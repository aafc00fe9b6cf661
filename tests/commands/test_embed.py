"""Features of folders of scans as a command: what is written, refused, resumed, and what it is equal to."""

import csv
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import mim3d
from mim3d.cli import main
from mim3d.commands.embed import embed
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.warned import LeakWarning
from mim3d.weights import load_encoder
from mim3d.workflows.embed.store import FeatureStore
from mim3d.workflows.shared.feature_tables import read_table
from tests.commands.conftest import BACKBONE
from tests.commands.test_probe import learn
from tests.labelled import ball_scan, write_scan

WINDOW = {"window_size": 16}


@pytest.fixture(scope="module")
def weights(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder that learned for a moment."""
    return str(learn(ball_set, tmp_path_factory.mktemp("embed") / "run"))


@pytest.fixture
def scans(ball_set: Path, tmp_path: Path) -> Path:
    """A folder of three scans."""
    (tmp_path / "scans").mkdir()
    for name in ("ball_0", "ball_1", "ball_2"):
        shutil.copy(ball_set / "imagesTr" / f"{name}.nii.gz", tmp_path / "scans" / f"{name}.nii.gz")
    return tmp_path / "scans"


def test_one_row_for_each_scan_as_the_encoder_run_by_hand_gives_it(scans, weights, tmp_path):
    table = embed(str(scans), weights, str(tmp_path / "f.parquet"), window_size=32)
    held = pq.read_table(tmp_path / "f.parquet")
    assert held.column_names == [*table.keys, *table.columns] and len(table.columns) == 2 * 16
    assert held["id"].to_pylist() == ["ball_0", "ball_1", "ball_2"]
    assert set(held["region"].to_pylist()) == {"scan"}
    np.testing.assert_array_equal(np.stack([held[name].to_numpy() for name in table.columns], 1), table.values)
    # Noise without air is all body.
    scan, encoder = mim3d.load_scan(scans / "ball_1.nii.gz", weights), load_encoder(weights)
    origin = tuple(-((32 - size) // 2) for size in scan.shape)
    with torch.no_grad():
        tokens = encoder(scan.crop(origin, (32, 32, 32)))[-1][0].numpy()
    stride = encoder.strides[-1]
    voxels = tokens.repeat(stride, 1).repeat(stride, 2).repeat(stride, 3)
    inside = tuple(slice(-at, size - at) for at, size in zip(origin, scan.shape, strict=True))
    mean = voxels[(slice(None), *inside)].reshape(16, -1).mean(1)
    np.testing.assert_allclose(table.values[1, :16], mean, rtol=1e-4, atol=1e-5)
    assert table["volume_ml"][1] == pytest.approx(np.prod(scan.shape) * 1.2 / 1000)


def failed_ids(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return [row["id"] for row in csv.DictReader(file)]


def test_a_second_call_keeps_what_the_first_could_not_embed(scans, weights, tmp_path):
    (tmp_path / "more").mkdir()
    for number, folder in enumerate((scans, tmp_path / "more")):
        (folder / f"bad_{number}.nii.gz").write_bytes(b"no scan")
        write_scan(folder / f"good_{number}.nii.gz", ball_scan(20 + number)[0])
    first, other = tmp_path / "f.parquet", tmp_path / "g.parquet"
    embed(str(scans), weights, str(first), **WINDOW)
    embed(str(tmp_path / "more"), weights, str(first), **WINDOW)
    assert failed_ids(tmp_path / "f.parquet.failed.csv") == ["bad_0", "bad_1"]
    assert [row["id"] for row in json.loads((tmp_path / "f.parquet.json").read_text())["failed"]] == ["bad_0", "bad_1"]
    # Another table in the folder has a list of its own.
    embed(str(scans / "ball_0.nii.gz"), weights, str(other), **WINDOW)
    embed(str(tmp_path / "more"), weights, str(other), **WINDOW)
    assert failed_ids(tmp_path / "g.parquet.failed.csv") == ["bad_1"]
    write_scan(scans / "bad_0.nii.gz", ball_scan(30)[0])
    embed(str(scans), weights, str(first), **WINDOW)
    assert failed_ids(tmp_path / "f.parquet.failed.csv") == ["bad_1"]


def test_scans_that_the_weights_were_learned_from_are_said_and_kept(ball_set, scans, weights, tmp_path):
    image = nibabel.load(scans / "ball_2.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image.get_fdata().astype(np.float32) * 2 + 5, image.affine), scans / "copy.nii")
    write_scan(scans / "new.nii.gz", ball_scan(77)[0])
    out = tmp_path / "f.parquet"
    for _ in range(2):
        # A call that finds all of it done says it again.
        with pytest.warns(LeakWarning, match=r"of 5 scans are in the pre-training data of .*ball_0 \(identical\)"):
            embed(str(scans), weights, str(out), **WINDOW)
        about = json.loads((tmp_path / "f.parquet.json").read_text())
        found = about["learned_from"]["found"]
        assert about["learned_from"]["list"] == "whole" and "new" not in found
        assert {"ball_0", "ball_1", "ball_2", "copy"} == set(found)
        assert {each["id"]: bool(each["learned_from"]) for each in about["scans"]}["copy"]
        assert not any("identity" in each for each in about["scans"])
        assert [row["kind"] for row in about["warnings"]].count("leak") == 1


def test_what_a_killed_call_has_embedded_is_looked_up_later(scans, weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), pytest.warns(LeakWarning):
            embed(str(scans), weights, str(tmp_path / "f.parquet"), **WINDOW)
    with pytest.warns(LeakWarning, match="3 of 3 scans are in the pre-training data"):
        embed(str(scans), weights, str(tmp_path / "f.parquet"), **WINDOW)


def test_the_description_says_what_the_features_are(scans, weights, tmp_path):
    embed(str(scans), weights, str(tmp_path / "f.parquet"), **WINDOW)
    about = json.loads((tmp_path / "f.parquet.json").read_text())
    assert about["identity"]["window_size"] == [16, 16, 16] and about["identity"]["weights_digest"]
    assert about["made_by"]["versions"]["mim3d"] == mim3d.__version__
    assert [each["id"] for each in about["scans"]] == ["ball_0", "ball_1", "ball_2"]
    assert sorted(os.listdir(tmp_path)) == ["f.parquet", "f.parquet.json", "scans"]


def test_a_bad_scan_is_listed_and_stops_no_other(scans, weights, tmp_path, capsys):
    whole = (scans / "ball_1.nii.gz").read_bytes()
    (scans / "ball_1.nii.gz").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "f.csv"
    words = ["embed", str(scans), "--weights", weights, "--out", str(out), "--window_size", "16"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "1 of 3 cases was left out" in said.out and "2 of 3 scans embedded" in said.out
    with open(tmp_path / "f.csv.failed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["ball_1"] and "ball_1.nii.gz" in rows[0]["reason"]
    assert list(read_table(str(out)).keys["id"]) == ["ball_0", "ball_2"]
    (scans / "ball_1.nii.gz").write_bytes(whole)
    assert main([*words, "--layer", "-1"]) == 0
    assert "3 of 3 scans embedded, 2 of them before" in capsys.readouterr().out
    assert list(read_table(str(out)).keys["id"]) == ["ball_0", "ball_1", "ball_2"]
    assert not (tmp_path / "f.csv.failed.csv").exists()


def test_none_that_can_be_embedded_is_an_error_with_the_first_reason(weights, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"None of 1 scan could be embedded, the first because of .*bad\.nii\.gz"):
        embed(str(tmp_path / "scans"), weights, str(tmp_path / "f.parquet"))
    assert (tmp_path / "f.parquet.failed.csv").is_file() and not (tmp_path / "f.parquet").exists()


def test_tables_in_one_folder_have_lists_of_their_own(scans, weights, tmp_path):
    (scans / "bad.nii.gz").write_bytes(b"nothing")
    embed(str(scans), weights, str(tmp_path / "a.csv"), window_size=16)
    (scans / "bad.nii.gz").unlink()
    embed(str(scans), weights, str(tmp_path / "b.csv"), window_size=16)
    assert sorted(path.name for path in tmp_path.glob("*failed.csv")) == ["a.csv.failed.csv"]


def test_what_comes_behind_a_failed_write_is_kept(scans, weights, tmp_path, monkeypatch):
    """A disk that is full for a moment: what is written afterwards is there when the run is killed."""
    import pyarrow as pa

    real, calls = pa.ipc.new_stream, []

    class Failing:
        def __init__(self, *arguments):
            self.writer = real(*arguments)

        def write_batch(self, batch, custom_metadata):
            calls.append(batch)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            self.writer.write_batch(batch, custom_metadata=custom_metadata)

        def close(self):
            self.writer.close()

    monkeypatch.setattr("pyarrow.ipc.new_stream", Failing)
    monkeypatch.setattr(FeatureStore, "conclude", lambda store, about: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(str(scans), weights, str(tmp_path / "f.csv"), window_size=16)
    assert len(list((tmp_path / "f.csv.parts").glob("*.arrows"))) == 2


def test_a_killed_run_goes_on_to_the_same_table(scans, weights, tmp_path, monkeypatch):
    whole = embed(str(scans), weights, str(tmp_path / "whole.parquet"), **WINDOW)
    out, count, add = tmp_path / "f.parquet", [], FeatureStore.add

    def killed(self, about, table):
        if count:
            raise KeyboardInterrupt
        count.append(about["id"])
        add(self, about, table)

    monkeypatch.setattr(FeatureStore, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(str(scans), weights, str(out), **WINDOW)
    # A kill may cut the last of what was being written.
    part = next((tmp_path / "f.parquet.parts").glob("*.arrows"))
    part.write_bytes(part.read_bytes() + b"\x01\x02\x03")
    done = []

    def counted(self, about, table):
        done.append(about["id"])
        add(self, about, table)

    monkeypatch.setattr(FeatureStore, "add", counted)
    again = embed(str(scans), weights, str(out), **WINDOW)
    assert done == ["ball_1", "ball_2"]
    np.testing.assert_array_equal(again.values, whole.values)
    assert not (tmp_path / "f.parquet.parts").exists()


def test_what_changed_is_embedded_again_and_what_is_added_comes_on_top(ball_set, scans, weights, tmp_path):
    out = str(tmp_path / "f.npz")
    first = embed(str(scans), weights, out, **WINDOW)
    shutil.copy(ball_set / "imagesTr" / "ball_4.nii.gz", scans / "ball_0.nii.gz")
    shutil.copy(ball_set / "imagesTr" / "ball_3.nii.gz", scans / "ball_3.nii.gz")
    again = embed(str(scans), weights, out, **WINDOW)
    assert again.keys["id"] == ["ball_0", "ball_1", "ball_2", "ball_3"]
    assert not np.array_equal(again.values[0], first.values[0])
    np.testing.assert_array_equal(again.values[1:3], first.values[1:3])


@pytest.mark.parametrize("ending", ["parquet", "csv", "npz", "h5"])
def test_every_format_holds_the_same(scans, weights, tmp_path, ending):
    if ending == "h5":
        pytest.importorskip("h5py")
    table = embed(str(scans), weights, str(tmp_path / f"f.{ending}"), **WINDOW)
    found = read_table(str(tmp_path / f"f.{ending}"))
    assert found.columns == table.columns and {k: list(v) for k, v in found.keys.items()} == dict(table.keys)
    np.testing.assert_array_equal(found.values, table.values)


def test_hdf5_has_a_file_for_each_scan_in_one_folder(scans, weights, tmp_path):
    h5py = pytest.importorskip("h5py")
    table = embed(str(scans), weights, str(tmp_path / "out"), format="h5", **WINDOW)
    assert sorted(os.listdir(tmp_path / "out")) == ["ball_0.h5", "ball_1.h5", "ball_2.h5", "features.json"]
    with h5py.File(tmp_path / "out" / "ball_2.h5") as file:
        np.testing.assert_array_equal(file["y_hat"][()], table.values[2])


def test_each_label_of_a_mask_has_a_row_named_as_declared(ball_set, weights, tmp_path):
    table = embed(str(ball_set), weights, masks=str(ball_set), window_size=32)
    assert table.keys["region"][:3] == ["scan", "ball", "core"] and len(table) == 18
    _, label = ball_scan(0)
    assert table["volume_ml"][1] == pytest.approx((label == 2).sum() * 1.2 / 1000)
    alone = embed(str(ball_set), weights, masks=str(ball_set / "labelsTr"), window_size=32, whole_scan=False)
    kept = [place for place, region in enumerate(table.keys["region"]) if region != "scan"]
    np.testing.assert_array_equal(alone.values, table.values[kept])


def test_one_mask_belongs_to_the_one_scan_whatever_it_is_called(ball_set, weights, tmp_path):
    shutil.copy(ball_set / "labelsTr" / "ball_0.nii.gz", tmp_path / "organs.nii.gz")
    scan = str(ball_set / "imagesTr" / "ball_0.nii.gz")
    table = embed(scan, weights, masks=str(tmp_path / "organs.nii.gz"), **WINDOW)
    assert table.keys["region"] == ["scan", "2", "5"]


def test_a_mask_that_is_empty_or_on_another_grid_is_told(ball_set, weights, tmp_path):
    shutil.copytree(ball_set / "imagesTr", tmp_path / "scans")
    masks = tmp_path / "masks"
    shutil.copytree(ball_set / "labelsTr", masks)
    _, label = ball_scan(0)
    write_scan(masks / "ball_0.nii.gz", label * 0)
    write_scan(masks / "ball_1.nii.gz", label)
    (masks / "ball_2.nii.gz").unlink()
    with pytest.warns(UserWarning, match="1 of 6 scans has no mask: ball_2"):
        table = embed(str(tmp_path / "scans"), weights, str(tmp_path / "f.parquet"), masks=str(masks), **WINDOW)
    rows = list(zip(table.keys["id"], table.keys["region"], strict=True))
    assert rows[:3] == [("ball_0", "scan"), ("ball_2", "scan"), ("ball_3", "scan")]
    about = json.loads((tmp_path / "f.parquet.json").read_text())
    assert "holds no label besides background" in about["scans"][0]["warnings"][0]
    assert "does not lie on the grid of" in about["failed"][0]["reason"]
    alone = embed(
        str(tmp_path / "scans"), weights, str(tmp_path / "g.parquet"), masks=str(masks), whole_scan=False, **WINDOW
    )
    assert sorted(set(alone.keys["id"])) == ["ball_3", "ball_4", "ball_5"]


def test_boxes_in_voxels_and_in_millimetres_are_the_same_whatever_the_orientation(weights, tmp_path):
    image, _ = ball_scan(0)
    affine = np.array([[-1.0, 0, 0, 40], [0, 0, 1.2, 3], [0, 1, 0, -7], [0, 0, 0, 1]])
    write_scan(tmp_path / "a.nii.gz", image, affine)
    first, last = np.array([3, 4, 5]), np.array([15, 12, 9])
    corners = np.stack([affine @ [*(first - 0.5), 1], affine @ [*(last - 0.5), 1]])[:, :3]
    low, high = corners.min(0), corners.max(0)
    names = ("x_min", "y_min", "z_min", "x_max", "y_max", "z_max")
    for path, ending, ends in (("v.csv", "", (*first, *last)), ("mm.csv", "_mm", (*low, *high))):
        head = ",".join(["id", "name", *(f"{name}{ending}" for name in names)])
        (tmp_path / path).write_text(f"{head}\na,nodule,{','.join(map(str, ends))}\n")
    one, other = (
        embed(str(tmp_path / "a.nii.gz"), weights, boxes=str(tmp_path / path), **WINDOW) for path in ("v.csv", "mm.csv")
    )
    assert one.keys["region"] == ["scan", "nodule"]
    assert one["volume_ml"][1] == pytest.approx(12 * 8 * 4 * 1.2 / 1000)
    np.testing.assert_array_equal(one.values, other.values)
    (tmp_path / "v.csv").write_text(f"id,{','.join(names)}\na,3,4,5,40,12,9\n")
    with pytest.warns(UserWarning, match=r"1 of 1 scan has remarks .* a box that was cut"):
        embed(str(tmp_path / "a.nii.gz"), weights, boxes=str(tmp_path / "v.csv"), **WINDOW)
    (tmp_path / "v.csv").write_text(f"id,{','.join(names)}\na,30,4,5,40,12,9\n")
    with pytest.raises(DataError, match=r"the box box_1 \(30, 4, 5, 40, 12, 9 voxels\) lies outside of it"):
        embed(str(tmp_path / "a.nii.gz"), weights, boxes=str(tmp_path / "v.csv"), **WINDOW)


def test_several_voxel_sizes_and_layers_have_columns_of_their_own(scans, weights):
    one = embed(str(scans), weights, spacing_mm=(2.0, 2.0, 2.0), layer="all", **WINDOW)
    both = embed(str(scans), weights, spacing_mm=[(2.0, 2.0, 2.0), (1.0, 1.0, 3.0)], layer="all", **WINDOW)
    assert one.columns[0] == "level0_mean_0" and one.columns[-1] == "level1_max_15"
    assert both.columns == (*(f"2mm_{name}" for name in one.columns), *(f"1x1x3mm_{name}" for name in one.columns))
    np.testing.assert_array_equal(both.values[:, : len(one.columns)], one.values)
    finest = embed(str(scans), weights, spacing_mm=(2.0, 2.0, 2.0), layer=0, **WINDOW)
    np.testing.assert_array_equal(finest.values, one.values[:, :16])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer": 5}, r"layer is 5, but this encoder has the maps 0 \(stride 2, 8 channels\), 1 "),
        ({"window_size": 17}, "window_size axis X .17. is not a multiple of stride 4"),
        ({"out": "features.xls"}, "features.xls ends in none of .parquet, .csv, .npz, .h5"),
        ({"spacing_mm": [(1.0, 1.0, 1.0)] * 2}, "name each voxel size once"),
        ({"whole_scan": False}, "neither masks nor boxes"),
        ({"out": "/proc/nowhere/f.csv"}, "choose another --out"),
    ],
)
def test_settings_that_cannot_work_are_refused(scans, weights, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        embed(**{"scans": str(scans), "weights": weights, **changes})


def test_a_table_of_other_weights_settings_or_origin_is_not_replaced(scans, weights, tmp_path):
    out = tmp_path / "f.csv"
    out.write_text("id,age\n")
    with pytest.raises(ConfigError, match="exists and was not written by mim3d embed"):
        embed(str(scans), weights, str(out), **WINDOW)
    out.unlink()
    embed(str(scans), weights, str(out), **WINDOW)
    with pytest.raises(ConfigError, match=r"holds features of window_size \[16, 16, 16\]"):
        embed(str(scans), weights, str(out), window_size=32)
    assert len(embed(str(scans), weights, str(out), window_size=32, overwrite=True)) == 3


def test_weights_that_do_not_fit_and_scans_of_other_channels_are_refused(scans, weights, tmp_path):
    (tmp_path / "half.safetensors").write_bytes((Path(weights) / "encoder" / "model.safetensors").read_bytes()[:900])
    with pytest.raises(CheckpointError, match=r"half\.safetensors"):
        embed(str(scans), str(tmp_path / "half.safetensors"), backbone=BACKBONE)
    image = scans / "ball_0.nii.gz"
    (tmp_path / "two.csv").write_text(f"image\n{image};{image}\n")
    with pytest.raises(DataError, match=r"a scan of 2 channels, but .* learned from 1"):
        embed(str(tmp_path / "two.csv"), weights)


def test_arrays_are_embedded_as_the_files_that_hold_them(scans, weights, tmp_path):
    images = [nibabel.load(scans / f"ball_{number}.nii.gz") for number in range(2)]
    arrays = [mim3d.ScanArray(each.get_fdata(dtype=np.float32), each.affine, f"a{n}") for n, each in enumerate(images)]
    table = mim3d.embed(arrays, weights, **WINDOW)
    files = mim3d.embed([scans / "ball_0.nii.gz", scans / "ball_1.nii.gz"], weights, **WINDOW)
    assert table.keys["id"] == ["a0", "a1"] and not any(map(os.path.exists, table.keys["image"]))
    np.testing.assert_array_equal(table.values, files.values)
    table.save(tmp_path / "f.npz")
    np.testing.assert_array_equal(read_table(str(tmp_path / "f.npz")).values, table.values)
    whole = mim3d.ScanArray((images[0].get_fdata() * 10).astype(np.int64), images[0].affine)
    assert np.isfinite(mim3d.embed(whole, weights, **WINDOW).values).all()


def test_arrays_that_cannot_be_scans_are_refused(weights, tmp_path):
    good = mim3d.ScanArray(np.ones((4, 4, 4)), np.eye(4))
    for make, sentence in (
        (lambda: mim3d.ScanArray(np.ones((4, 4)), np.eye(4)), r"has the shape \(4, 4\)"),
        (lambda: mim3d.ScanArray(np.ones((4, 4, 4)), np.eye(3)), "affine of array has the shape"),
        (lambda: mim3d.ScanArray(np.ones((4, 4, 4)), np.eye(4), "../x"), "cannot be the name of a file"),
        (lambda: mim3d.embed(np.ones((4, 4, 4)), weights), r"scans is ndarray, but it takes paths, or arrays as"),
        (lambda: mim3d.embed([good, good], weights), "Several arrays have the id array"),
        (lambda: mim3d.embed([good, "a.nii"], weights), "both paths and arrays"),
        (lambda: mim3d.embed(good, weights, str(tmp_path / "f.csv")), "leave it out, and save the table"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make()
