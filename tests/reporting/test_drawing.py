"""Slices as a radiologist expects them, and pictures that a page carries itself."""

import base64

import numpy as np
import pytest
from matplotlib.figure import Figure

from mim3d.reporting.drawing import PLANES, Theme, chart, film, grey_range, label_colour, run_colour

AXIAL, CORONAL, SAGITTAL = PLANES
SHAPE = (4, 5, 6)


def marked(index):
    array = np.zeros(SHAPE)
    array[index] = 1
    return array


@pytest.mark.parametrize(
    ("plane", "where", "row", "column"),
    [
        (AXIAL, (3, 4, 2), 0, 0),  # right anterior: upper left
        (AXIAL, (0, 0, 2), 4, 3),  # left posterior: lower right
        (CORONAL, (3, 2, 5), 0, 0),  # right superior: upper left
        (CORONAL, (0, 2, 0), 5, 3),
        (SAGITTAL, (2, 4, 5), 0, 0),  # anterior superior: upper left
        (SAGITTAL, (2, 0, 0), 5, 4),
    ],
)
def test_planes_follow_the_radiological_convention(plane, where, row, column):
    slice_ = plane.cut(marked(where), where[plane.axis])
    assert np.argwhere(slice_).tolist() == [[row, column]]


def test_slices_are_shown_in_millimetres():
    assert AXIAL.extent_mm(SHAPE, (2.0, 1.0, 3.0)) == (0.0, 8.0, 0.0, 5.0)
    assert SAGITTAL.extent_mm(SHAPE, (2.0, 1.0, 3.0)) == (0.0, 5.0, 0.0, 18.0)


def test_charts_are_drawn_for_light_and_dark_pages_into_the_page_itself():
    themes: list[Theme] = []

    def draw(theme):
        themes.append(theme)
        return Figure(figsize=(1, 1))

    html = chart(draw, 'loss "a" <b>')
    assert len({theme.ink for theme in themes}) == 2
    assert html.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in html and "prefers-color-scheme: dark" in html


def test_films_are_png_pictures():
    source = film(Figure(figsize=(1, 1)), "slices").split("base64,")[1].split('"')[0]
    assert base64.b64decode(source).startswith(b"\x89PNG")


def test_the_grey_range_survives_constant_and_empty_pictures():
    assert grey_range(np.full((3, 3), 7.0)) == (7.0, 8.0)
    assert grey_range(np.full((3, 3), np.nan)) == (0.0, 1.0)


def test_the_first_28_colours_differ():
    for colours in (run_colour, label_colour):
        assert len({colours(position) for position in range(28)}) == 28
