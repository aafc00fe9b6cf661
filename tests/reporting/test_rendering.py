"""Templates: what is put into HTML is text, and a missing value is an error."""

import jinja2
import pytest

from mim3d.reporting.rendering import render


def test_text_in_html_is_escaped_and_what_was_rendered_here_is_not():
    image = render("film.html", source="data:,", alt='a "b" <i>')
    assert "&lt;i&gt;" in image and "<i>" not in image
    page = render("report.html", title="<b>", lead="", sections=[("runs", "Runs", image)], footer="")
    assert "<h1>&lt;b&gt;</h1>" in page
    assert image in page


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="alt"):
        render("film.html", source="data:,")
