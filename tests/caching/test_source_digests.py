"""Digests follow contents; files are read once."""

import os

import pytest

from mim3d.caching import case
from mim3d.caching.case import digest_files, require_unchanged, source_files
from mim3d.core.errors import DataError


def test_the_digest_follows_contents_not_names(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    one, other, different = (digest_files([str(tmp_path / name)], {})[0] for name in "abc")
    assert one == other != different


def test_a_file_of_known_stamp_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("x")
    digest, memo = digest_files([str(path)], {})
    monkeypatch.setattr(case.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert digest_files([str(path)], memo)[0] == digest


def test_a_changed_file_is_noticed_even_with_its_old_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    before = path.stat()
    digest, memo = digest_files([str(path)], {})
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_files([str(path)], memo)[0] != digest
    with pytest.raises(DataError, match="changed while it was being read"):
        require_unchanged(memo)


def test_detached_headers_bring_their_voxels_and_nothing_else(tmp_path):
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 1 1 2\nencoding: raw\ndata file: {}\n"
    meta = "NDims = 3\nDimSize = 1 1 2\nElementType = MET_UCHAR\nElementDataFile = {}\n"
    for name in ("v.raw", "s1.raw", "s2.raw", "other.raw"):
        (tmp_path / name).write_bytes(bytes(2))
    named = {"v.raw": ["v.raw"], "s%d.raw 1 2 1": ["s1.raw", "s2.raw"], "LIST\ns2.raw\ns1.raw": ["s2.raw", "s1.raw"]}
    for value, expected in named.items():
        for name, text in (("a.nhdr", nrrd), ("b.mhd", meta)):
            (tmp_path / name).write_text(text.format(value))
            assert [os.path.basename(path) for path in source_files(str(tmp_path / name))] == [name, *expected]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.nii"):
        source_files(str(tmp_path / "absent.nii"))


def test_a_dicom_series_is_all_its_slices(shared_data):
    assert len(source_files(str(shared_data / "dicom" / "cip_ct64"))) == 79
