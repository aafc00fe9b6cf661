"""Small pieces of HTML that tables and captions share."""

from html import escape


def number(value: float | None, decimals: int) -> str:
    """A score, or a dash where it is not defined."""
    return "–" if value is None else f"{value:.{decimals}f}"


def breakable(name: str) -> str:
    """HTML of a name that a narrow column may break after an underscore or a dash."""
    return escape(name).replace("_", "_<wbr>").replace("-", "-<wbr>").replace("/", "/<wbr>")


def swatch(colour: str) -> str:
    """HTML of the little square that a legend puts before a name."""
    return f'<span class="swatch" style="background:{colour}"></span>'
