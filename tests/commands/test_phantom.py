import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mim3d.commands.phantom import phantom
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import read_cases
from mim3d.datasets.usable import usable_cases
from mim3d.phantoms import dataset as phantom_set
from mim3d.phantoms.body import make_phantom
from mim3d.phantoms.dataset import PhantomSettings, plan_cases
from mim3d.phantoms.parts import LABELS
from mim3d.scans.volumes import read_grid, read_volume
from mim3d.tasks.segmentation.task import Segmentation

SIZE = (32, 28, 24)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(phantom(str(tmp_path_factory.mktemp("phantoms") / "set"), num_cases=8, size=SIZE, seed=4, num_test=1))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_set_is_read_as_a_decathlon_data_set(made: Path) -> None:
    cases = read_cases(str(made))
    assert usable_cases(cases, lacks=Segmentation().lacks) == cases
    assert [case.id for case in cases.cases] == [f"phantom_{number:03d}" for number in range(8)]
    assert cases.labels == LABELS
    described = json.loads((made / "dataset.json").read_text())
    assert described["modality"] == {"0": "CT"}
    assert described["test"] == ["./imagesTs/phantom_test_000.nii.gz"]


def test_test_cases_have_labels_beside_them(made: Path) -> None:
    image = read_grid(made / "imagesTs" / "phantom_test_000.nii.gz")
    label = read_grid(made / "labelsTs" / "phantom_test_000.nii.gz")
    assert np.array_equal(image.affine, label.affine) and image.shape == label.shape


def test_files_hold_the_phantom_of_their_plan_whatever_their_stored_axes(made: Path) -> None:
    settings = PhantomSettings(num_cases=8, size=SIZE, seed=4, num_test=1)
    plan = plan_cases(settings)
    assert len({case.stored_axes for case in plan}) > 2
    for case in plan:
        expected = make_phantom(case.seed, case.shape)
        image, label = read_volume(made / case.image), read_volume(made / case.label, label=True)
        assert "".join(nib.aff2axcodes(image.grid.affine)) == case.stored_axes
        assert np.array_equal(image.array, expected.image) and image.array.dtype == np.int16
        assert np.array_equal(label.array, expected.label)
        assert np.allclose(image.affine, expected.affine, atol=1e-3)


def test_the_first_case_has_the_full_size_and_others_differ(made: Path) -> None:
    shapes = [read_grid(case.images[0]).ras_shape for case in read_cases(str(made)).cases]
    assert shapes[0] == SIZE
    assert len(set(shapes)) > 4
    assert all(have <= most for shape in shapes for have, most in zip(shape, SIZE, strict=True))


def test_the_same_settings_give_the_same_files(made: Path, tmp_path: Path) -> None:
    again = Path(phantom(str(tmp_path / "again"), num_cases=8, size=SIZE, seed=4, num_test=1))
    assert files_of(again) == files_of(made)


def test_a_case_does_not_depend_on_how_many_there_are(made: Path, tmp_path: Path) -> None:
    fewer = files_of(Path(phantom(str(tmp_path / "fewer"), num_cases=2, size=SIZE, seed=4)))
    for name in ("imagesTr/phantom_001.nii.gz", "labelsTr/phantom_001.nii.gz"):
        assert fewer[name] == (made / name).read_bytes()


def test_an_interrupted_set_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = files_of(Path(phantom(str(tmp_path / "whole"), num_cases=3, size=SIZE)))
    calls = 0
    real = phantom_set.write_volume

    def killed(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        real(*args, **kwargs)  # type: ignore[arg-type]

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(phantom_set, "write_volume", killed)
        with pytest.raises(KeyboardInterrupt):
            phantom(str(out), num_cases=3, size=SIZE)
    assert not (out / "dataset.json").exists()
    half = out / "imagesTr" / ".abc.partial"
    half.mkdir()
    (half / "phantom_001.nii.gz").write_bytes(b"half")
    finished = out / "imagesTr" / "phantom_000.nii.gz"
    written_at = finished.stat().st_mtime_ns
    capsys.readouterr()
    phantom(str(out), num_cases=3, size=SIZE)
    assert finished.stat().st_mtime_ns == written_at
    assert files_of(out) == whole
    assert "1 of them kept" in capsys.readouterr().out


def test_a_damaged_case_is_made_again(tmp_path: Path) -> None:
    out = Path(phantom(str(tmp_path / "set"), num_cases=2, size=SIZE))
    whole = files_of(out)
    damaged = out / "imagesTr" / "phantom_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    phantom(str(out), num_cases=2, size=SIZE)
    assert files_of(out) == whole


def test_a_folder_of_other_settings_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = Path(phantom(str(tmp_path / "set"), num_cases=1, size=SIZE))
    before = files_of(out)
    with pytest.raises(ConfigError, match="seed 0 instead of 9"):
        phantom(str(out), num_cases=1, size=SIZE, seed=9)
    assert files_of(out) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        phantom(str(tmp_path), num_cases=1, size=SIZE)
    with pytest.raises(ConfigError, match="not empty"):
        phantom(str(tmp_path / "thesis.txt"), num_cases=1, size=SIZE)


def test_damaged_settings_of_a_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "phantom.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        phantom(str(tmp_path), num_cases=1, size=SIZE)


def test_a_place_that_cannot_be_written_to_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another"):
        phantom(str(tmp_path / "file" / "set"), num_cases=1, size=SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cases": 0}, "num_cases is 0"),
        ({"num_test": -1}, "num_test is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"size": (96, 96, 8)}, "96 x 96 x 8"),
        ({"size": (20000, 20000, 20000)}, "GiB of memory"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        phantom(str(tmp_path / "set"), **{"num_cases": 1, "size": SIZE, **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
