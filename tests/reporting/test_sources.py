"""Names and colours of runs and scores."""

from mim3d.reporting.sources import short_names


def test_names_are_as_short_as_they_can_be():
    assert short_names(["/runs/a", "/runs/b"]) == {"/runs/a": "a", "/runs/b": "b"}


def test_names_that_clash_get_the_folder_that_tells_them_apart():
    names = short_names(["/x/scores.json", "/y/scores.json", "/z/run"])
    assert names == {"/x/scores.json": "x/scores", "/y/scores.json": "y/scores", "/z/run": "run"}


def test_a_path_inside_another_has_a_name_of_its_own():
    names = short_names(["/a/b", "/b"])
    assert len(set(names.values())) == 2
