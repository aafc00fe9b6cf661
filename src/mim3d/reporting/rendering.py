"""Templates of the report, of the tables for a paper and of READMEs, filled by jinja2."""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    **{mark: "\\" + mark for mark in "&%$#_"},
}


def render(template: str, **values: Any) -> str:
    """Fill a template of this package.

    Args:
        template: File name of the template. What is put into HTML is escaped, unless it was rendered here itself.
        values: Values by the names that the template uses.

    Returns:
        The text.

    Raises:
        jinja2.UndefinedError: The template uses a name that has no value.
    """
    from markupsafe import Markup

    text = _environment().get_template(template).render(values)
    return Markup(text) if template.endswith(".html") else text


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mim3d.reporting"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def breakable(name: str) -> str:
        # A narrow column may break it after an underscore, a dash or a slash.
        return Markup(re.sub(r"([_\-/])", r"\1<wbr>", str(escape(name))))

    def latex(text: str) -> str:
        return "".join(_LATEX.get(mark, mark) for mark in text.replace("\n", " "))

    def markdown(text: str) -> str:
        return re.sub(r"([\\`*_{}|<>#~])", r"\\\1", text.replace("\n", " "))

    filters = {"breakable": breakable, "interval": interval, "latex": latex, "markdown": markdown, "number": number}
    environment.filters |= filters
    return environment


def number(value: float | None, decimals: int) -> str:
    """A number with a true minus sign and none before a zero; a dash where it is not defined."""
    if value is None:
        return "–"
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def interval(ends: Sequence[float] | None, decimals: int) -> str:
    """An interval as "low to high", empty where there is none."""
    return f"{number(ends[0], decimals)} to {number(ends[1], decimals)}" if ends else ""
