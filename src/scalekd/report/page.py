"""Builds a page: one HTML file without scripts or external resources, for light and dark themes and any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .svg import drawing_style, escape

NONE = "\N{EN DASH}"  # an empty cell of a table


def page(title: str, sections: Sequence[str], style: str = "") -> str:
    """The whole file. Title and sections are HTML; `style` is appended to the report's own CSS."""
    body = "\n".join(section for section in sections if section)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{drawing_style()}{STYLE}{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def section(title: str, content: str, note: str = "") -> str:
    """A section; all arguments are HTML."""
    return f"<section><h2>{title}</h2>{content}" + (f'<p class="note">{note}</p>' if note else "") + "</section>"


def facts_section(facts: Mapping[str, str]) -> str:
    return section("Facts", definitions(facts))


def definitions(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table. Cells are text, the first of a row is its heading. kind: CSS classes; `numbers` if the last column has numbers too."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    style = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{style}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def panels(figures: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def folded(title: str, content: str) -> str:
    """Content that is closed until clicked. Both arguments are HTML."""
    return f"<details><summary>{title}</summary>{content}</details>"


def code(text: str) -> str:
    """`text` as preformatted lines."""
    return (
        f'<pre class="scroll" tabindex="0"><code>{"&#10;".join(map(escape, text.rstrip().split(chr(10))))}</code></pre>'
    )


STYLE = """
:root { --rest: #c4c4c4 } .data, .hatch-ground { --f: #e69f00 } .teacher { --f: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --rest: #777 } .teacher { --f: #56b4e9 } }
body { margin: 0 auto; padding: 16px; max-width: 960px; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: .5rem 0 }
.note { color: var(--soft); font-size: .875rem; max-width: 44rem } a { color: inherit }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; overflow-wrap: normal }
th, td { text-align: right; padding: .4rem .5rem; border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums }
td { white-space: nowrap } th:first-child, th:last-child, td:last-child { text-align: left; white-space: normal }
td:last-child { min-width: 12rem }
.numbers th:not(:first-child), .numbers td { text-align: right; min-width: 0 } thead th { vertical-align: bottom }
.names td:nth-child(2) { white-space: normal; text-align: left } .names th:nth-child(2) { text-align: left }
.numbers td:last-child { white-space: nowrap } .scroll + figure { margin-top: 1.25rem }
figure { margin: 0; max-width: 540px; min-width: 0 } svg.figure { display: block; width: 100%; height: auto; overflow: visible }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px 24px }
.legend { list-style: none; margin: .25rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .875rem }
.legend svg { vertical-align: -2px; margin-right: .35rem }
.teacher { fill: var(--f) } .data { fill: url(#hatch) } .rest { fill: var(--rest) }
.hatch-ground { fill: var(--f) } .hatch-line { fill: var(--page) }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 16px }
.pictures img { width: 100%; max-width: 160px; aspect-ratio: 1; object-fit: contain; background: var(--grid) }
.wide { max-width: none } .wide img { max-width: 100%; height: auto; background: #fff }
.small { image-rendering: pixelated } figcaption { font-size: .875rem }
pre { background: color-mix(in srgb, var(--grid) 40%, var(--page)); padding: .6rem .8rem; font-size: .8125rem; margin: .5rem 0 }
details { margin: .5rem 0 } summary { cursor: pointer }
.shade { fill: var(--ink) } .faint text { font-size: 11px } .over { fill: var(--page); stroke: none }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem }
dt { color: var(--soft) } dd { margin: 0 }
@media (max-width: 600px) { table { font-size: .8125rem } th, td { padding: .35rem .3rem } dl { display: block } dd { margin-bottom: .4rem } }
"""
