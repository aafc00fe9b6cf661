"""Templates: what is put into HTML is text, a missing value is an error, and a page carries its images itself."""

import base64

import jinja2
import pytest
from matplotlib.figure import Figure

from mim3d.reporting.rendering import Theme, chart, film, label_colour, render, run_colour


def test_text_in_html_is_escaped_and_what_was_rendered_here_is_not():
    image = render("film.html", source="data:,", alt='a "b" <i>')
    assert "&lt;i&gt;" in image and "<i>" not in image
    page = render("report.html", title="<b>", lead="", sections=[("runs", "Runs", image)], footer="")
    assert "<h1>&lt;b&gt;</h1>" in page
    assert image in page


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="alt"):
        render("film.html", source="data:,")


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
