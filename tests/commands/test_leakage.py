"""A held-out scan that was learned from is said so, whatever it is called, and nothing else is told of it."""

import warnings

import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.fingerprints import ScanIdentity
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import CheckpointError, DataError
from mim3d.datasets.cases import read_cases
from mim3d.phantoms.body import make_phantom
from mim3d.weights import WEIGHTS_NAME
from mim3d.workflows.shared.leakage import (
    SEEN_NAME,
    Seen,
    check_leakage,
    check_pretraining,
    identities_of,
    read_seen,
    seen_from,
    write_seen,
)
from tests.nifti import write_nifti


def write_phantom(path, seed, dtype=np.int16):
    made = make_phantom((0, 0, seed), (40, 40, 32))
    write_nifti(path, made.image.astype(dtype), made.affine)


def cached(folder, **preprocessing):
    cases = read_cases(str(folder))
    return build_cache(cases, folder.with_name(f"{folder.name}_cache"), Preprocessing(**preprocessing))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Cached scans: three that are learned from, and two held out of which one is among the three."""
    root = tmp_path_factory.mktemp("leakage")
    for seed in range(3):
        write_phantom(root / f"learned/smith_{seed}.nii.gz", seed)
    write_phantom(root / "held_out/jones.nii.gz", 7)
    # Converted, so that the file is another one; and stored as fine-tuning does.
    write_phantom(root / "held_out/copy.nii.gz", 1, np.float32)
    return (
        identities_of(cached(root / "learned", intensities="8-bit")),
        identities_of(cached(root / "held_out", intensities="lossless", spacing_mm=(12.0, 12.0, 12.0))),
    )


@pytest.fixture
def run(tmp_path, scans):
    """A run whose encoder lists what it has seen."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / WEIGHTS_NAME).write_bytes(b"")
    write_seen(tmp_path / "encoder", seen_from(scans[0], None))
    return tmp_path


def test_a_held_out_scan_of_the_pretraining_data_is_warned_of(run, scans, capsys):
    with pytest.warns(UserWarning, match=r"1 of 2 held-out cases is in the pre-training data of .*: copy \(the same"):
        check_pretraining(str(run), scans[1], strict=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", ["", "encoder", f"encoder/{WEIGHTS_NAME}"])
def test_strict_refuses_it_however_the_weights_are_named(run, scans, given):
    with pytest.raises(DataError, match=r"copy .*strict"):
        check_pretraining(str(run / given), scans[1], strict=True)


def test_nothing_is_said_where_nothing_leaks(run, scans, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = [entry for entry in scans[1] if entry.id == "jones"]
        check_pretraining(str(run), new, strict=True)
        check_pretraining(None, scans[1], strict=True)
        check_pretraining(str(run), [], strict=True)
        check_leakage(scans[0], new, strict=True)
    assert capsys.readouterr().out == ""


def test_the_list_names_nobody(run, scans):
    text = (run / "encoder" / SEEN_NAME).read_text()
    assert "smith" not in text
    assert ".nii" not in text
    assert str(run) not in text
    seen = read_seen(run)
    assert {entry.id for entry in seen.scans} == {""}
    assert {entry.digest for entry in seen.scans} == {entry.digest for entry in scans[0]}


def test_foreign_weights_are_used_with_one_note(tmp_path, scans, capsys):
    file = tmp_path / "published.pt"
    file.write_bytes(b"")
    check_pretraining(str(file), scans[1], strict=True)
    assert capsys.readouterr().out.count("note:") == 1


def test_a_list_grows_with_every_round_and_knows_what_it_lacks(tmp_path, run, scans, capsys):
    longer = seen_from(scans[1], str(run))
    assert len(longer.scans) == 5
    assert longer.complete
    foreign = tmp_path / "published.pt"
    foreign.write_bytes(b"")
    lacking = seen_from(scans[0], str(foreign))
    assert not lacking.complete
    write_seen(run / "encoder", lacking)
    with pytest.warns(UserWarning, match="copy"):
        check_pretraining(str(run), scans[1], strict=False)
    assert "only part of a list" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 2}', '{"format": 1, "complete": true, "scans": [{"digest": "a", "fingerprint": 3}]}'],
)
def test_a_damaged_list_is_refused(run, text):
    (run / "encoder" / SEEN_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=SEEN_NAME):
        read_seen(run)


def test_one_scan_under_two_names_in_both_parts_is_found(scans):
    training, held_out = scans
    twin = ScanIdentity(id="twin", digest=training[2].digest, fingerprint=training[2].fingerprint)
    with pytest.warns(UserWarning) as caught:
        check_leakage(training, [*held_out, twin], strict=False)
    (warning,) = caught
    assert "2 of 3 held-out cases are among the training cases too" in str(warning.message)
    assert "twin (identical as smith_2)" in str(warning.message)
    assert "copy (the same scan, converted as smith_1)" in str(warning.message)


def test_many_leaks_make_one_sentence_with_the_first_few(scans):
    entry = scans[0][0]
    many = [ScanIdentity(id=f"case_{at}", digest=entry.digest, fingerprint=entry.fingerprint) for at in range(40)]
    with pytest.warns(UserWarning, match=r"40 of 40 held-out cases .* and 35 more"):
        leaks = check_leakage([entry], many, place="here", strict=False)
    assert len(leaks) == 40


def test_a_list_is_written_the_same_whatever_the_order(tmp_path, scans):
    texts = []
    for order in (scans[0], scans[0][::-1]):
        write_seen(tmp_path, Seen(scans=tuple(order)))
        texts.append((tmp_path / SEEN_NAME).read_bytes())
    assert texts[0] == texts[1]
    assert len(texts[0]) < 3 * 5000


def test_labels_and_voxel_sizes_do_not_hide_a_scan(scans):
    first, second = scans[0][1], next(entry for entry in scans[1] if entry.id == "copy")
    assert first.digest != second.digest
    assert not np.array_equal(first.fingerprint.extent_mm, second.fingerprint.extent_mm)
