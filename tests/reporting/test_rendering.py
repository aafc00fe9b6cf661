"""Templates: what is put into HTML is text, a missing value is an error, and a page carries its images itself."""

import base64

import jinja2
import pytest
from matplotlib.figure import Figure

from mim3d.reporting.paper_tables import PaperTable, latex, markdown
from mim3d.reporting.rendering import Theme, chart, chart_text, film, label_colours, render, run_colour


def test_text_in_html_is_escaped_and_what_was_rendered_here_is_not():
    image = render("film.html", source="data:,", alt='a "b" <i>')
    assert "&lt;i&gt;" in image and "<i>" not in image
    page = render("report.html", runs="", title="<b>", lead="", sections=[("runs", "Runs", image)], footer="")
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


def test_the_first_28_colours_of_runs_differ():
    assert len({run_colour(position) for position in range(28)}) == 28


def test_references_and_predictions_of_many_labels_have_colours_of_their_own():
    pairs = [label_colours(position) for position in range(40)]
    assert len({colour for pair in pairs for colour in (pair.reference, pair.prediction)}) == 80


def test_names_from_files_are_escaped_in_every_form():
    name = "[x](http://e.vil)|\x1b[31m\u202e<script>"
    table = PaperTable("scores", name, ["Label", name], [["[liver]", "1"], [name, "2"]])
    page, tex = markdown([table]), latex([table])
    for text in (page, tex):
        assert "\x1b" not in text and "\u202e" not in text
    assert "](" not in page and "<script" not in page.replace("\\<", "")
    # LaTeX would take "[liver]" at the start of a row for the length of the line end before it.
    assert "\n{}[liver] & 1" in tex and r"\textbackslash{}x1b" in tex
    shown = render("film.html", source="x", alt='"><script>\x1b\u202e')
    assert "<script>" not in shown and "\x1b" not in shown and "\u202e" not in shown


def test_a_label_with_dollar_signs_is_no_formula_of_a_chart():
    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.subplots().set_title(chart_text("cost $\\frac{ $"))
        return figure

    assert "data:image/png" in chart(draw, "title")
