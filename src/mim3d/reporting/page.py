"""The frame of a report: one HTML file that needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --faint: #646b75; --paper: #ffffff; --line: #e0e3e8;
  --panel: #f6f7f9; --better: #0b7a3b; --worse: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --faint: #9aa1ab; --paper: #15181c; --line: #30353c;
  --panel: #1d2126; --better: #5fce8f; --worse: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 60rem; }
.lead, .note, .faint, figcaption { color: var(--faint); }
.note, figcaption, .legend { font-size: .88rem; }
nav { margin: 1rem 0 0; font-size: .92rem; } nav a { margin-right: 1.1rem; color: inherit; }
img { max-width: 100%; height: auto; display: block; }
.film { background: #000; border-radius: 4px; width: 100%; }
figure { margin: 0; min-width: 0; max-width: 60rem; } figcaption { margin-top: .35rem; overflow-wrap: anywhere; }
.row { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.row.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.row figure { max-width: 46rem; }
.wide { overflow-x: auto; } .wide .chart { min-width: 40rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--faint); font-weight: 600; } tbody th { font-weight: 500; }
.scores tbody th { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; padding-left: .8rem; padding-right: 0; }
thead .number { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
.group { text-align: center; padding-left: 1.6rem; } .edge { padding-left: 1.6rem; }
td small { font-size: .82em; }
.mean th, .mean td { font-weight: 650; border-top: 2px solid var(--line); }
.better { color: var(--better); } .worse { color: var(--worse); } .same { color: var(--faint); }
td .better, td .worse, td .same { font-size: .85em; font-weight: 500; margin-left: .35em; }
.swatch { display: inline-block; width: .72em; height: .72em; border-radius: 2px; margin-right: .45em; }
.legend span.item { margin-right: 1.2rem; white-space: nowrap; }
details { margin: .7rem 0; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .9rem; }
summary { cursor: pointer; font-weight: 550; } details[open] > summary { margin-bottom: .6rem; }
pre { margin: 0; font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
dl { margin: 0; font-size: .88rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
footer { margin-top: 3.5rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--faint);
  font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  h2 { break-after: avoid; } h3 { break-after: avoid; } figure, tr, details { break-inside: avoid; }
  .film, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .wide { overflow: visible; }
  .wide .chart { min-width: 0; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading and its HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole HTML document; `title`, `lead` and `footer` are plain text."""
    links = "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    parts = "".join(
        f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>{part.body}</section>\n' for part in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p><nav>{links}</nav></header>\n{parts}'
        f"<footer>{escape(footer)}</footer></body></html>\n"
    )


def note(text: str) -> str:
    """A remark in plain text, such as what is missing."""
    return f'<p class="note">{escape(text)}</p>'


def folded(summary: str, body: str) -> str:
    """HTML that a reader opens when they want it; `summary` is plain text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def figure(picture: str, caption: str = "") -> str:
    """A picture with its caption, both HTML."""
    return f"<figure>{picture}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of text; the first column names the row."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
