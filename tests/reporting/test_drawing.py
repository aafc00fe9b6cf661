"""Images that a page carries itself."""

import base64

from matplotlib.figure import Figure

from mim3d.reporting.drawing import Theme, chart, film, label_colour, run_colour


def test_charts_are_drawn_for_light_and_dark_pages_into_the_page_itself():
    themes: list[Theme] = []

    def draw(theme):
        themes.append(theme)
        return Figure(figsize=(1, 1))

    html = chart(draw, 'loss "a" <b>')
    assert len({theme.ink for theme in themes}) == 2
    assert html.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in html and "prefers-color-scheme: dark" in html


def test_films_are_png_images():
    source = film(Figure(figsize=(1, 1)), "slices").split("base64,")[1].split('"')[0]
    assert base64.b64decode(source).startswith(b"\x89PNG")


def test_the_first_28_colours_differ():
    for colours in (run_colour, label_colour):
        assert len({colours(position) for position in range(28)}) == 28
