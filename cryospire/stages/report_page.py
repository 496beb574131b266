"""HTML of the report: one file, no server, no network; figures and style are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

STYLE = """
:root { --ink:#1d2b36; --soft:#5b6b78; --line:#dde4ea; --paper:#fff; --wash:#f4f7f9; --accent:#0b6e8a }
* { box-sizing:border-box } html { scroll-behavior:smooth }
body { margin:0; font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif; color:var(--ink); background:var(--wash) }
header { background:linear-gradient(120deg,#0b3c49,#0b6e8a 70%,#3a9fb0); color:#fff; padding:2.2rem 1.5rem 2rem }
header .in, main { max-width:1120px; margin:0 auto }
header h1 { margin:0; font-weight:650; letter-spacing:-.01em; font-size:1.9rem } header p { margin:.3rem 0 0; opacity:.85 }
.tiles { display:flex; flex-wrap:wrap; gap:.7rem; margin-top:1.3rem }
.tile { background:rgba(255,255,255,.13); border-radius:10px; padding:.55rem 1rem; min-width:7rem }
.tile b { display:block; font-size:1.35rem; font-weight:650; line-height:1.25 } .tile span { font-size:.82rem; opacity:.85 }
nav { position:sticky; top:0; z-index:2; background:rgba(255,255,255,.96); border-bottom:1px solid var(--line) }
nav div { max-width:1120px; margin:0 auto; padding:.5rem 1.5rem; display:flex; flex-wrap:wrap }
nav a { color:var(--soft); text-decoration:none; font-size:.88rem; margin-right:1.1rem } nav a:hover { color:var(--accent) }
main { padding:1.4rem 1rem 4rem }
section { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:1.3rem 1.6rem 1.5rem; margin:0 0 1.2rem }
section { scroll-margin-top:3rem } h2 { margin:0 0 .5rem; font-size:1.28rem; font-weight:650 }
h3 { margin:1.4rem 0 .3rem; font-size:1rem; font-weight:650 } p { margin:.4rem 0 .8rem; max-width:75ch }
.absent { color:var(--soft); font-style:italic }
.row { display:flex; flex-wrap:wrap; gap:1.4rem; align-items:flex-start } .row > * { flex:1 1 300px; min-width:0 }
figure { margin:.6rem 0 0 } figure img { max-width:100%; height:auto; display:block }
figcaption { color:var(--soft); font-size:.88rem; margin-top:.35rem; max-width:90ch }
table { border-collapse:collapse; font-size:.9rem; margin:.5rem 0; font-variant-numeric:tabular-nums }
th,td { padding:.28rem .9rem .28rem 0; text-align:left; vertical-align:top; border-bottom:1px solid var(--line) }
th { color:var(--soft); font-weight:550 } td.n, th.n { text-align:right } .scroll { overflow-x:auto }
details { margin:.5rem 0 } summary { cursor:pointer; color:var(--accent) }
.flip { width:100%; max-width:900px; aspect-ratio:3/1; background-repeat:no-repeat; border-radius:8px }
input[type=range] { width:100%; max-width:900px; accent-color:var(--accent) }
@media print { nav,input { display:none } section { break-inside:avoid; border:0 } body { background:#fff } }
"""

INCH = 100  # pixels of the page

SCRIPT = """
document.querySelectorAll('input[data-flip]').forEach(function (s) {
  var box = document.getElementById(s.dataset.flip), n = +s.max;
  function show() { box.style.backgroundPosition = '0 ' + (n ? 100 * s.value / n : 0) + '%'; }
  s.addEventListener('input', show); show();
});
"""


def text(*sentences: str) -> str:
    """A paragraph; plain text."""
    return f"<p>{escape(' '.join(sentences))}</p>"


def absent(what: str) -> str:
    return f'<p class="absent">{escape(what)}</p>'


def row(*blocks: str) -> str:
    """Blocks side by side where there is room."""
    return '<div class="row">' + "".join(f"<div>{b}</div>" for b in blocks) + "</div>"


def heading(title: str) -> str:
    return f"<h3>{escape(title)}</h3>"


def picture(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def curve(drawn: Figure, caption: str) -> str:
    """A matplotlib figure of lines, as SVG."""
    return _drawn(drawn, "svg", caption)


def image(drawn: Figure, caption: str) -> str:
    """A matplotlib figure of images or clouds of points, as PNG of twice the resolution shown."""
    return _drawn(drawn, "png", caption)


def _drawn(drawn: Figure, kind: str, caption: str) -> str:
    buffer = io.BytesIO()
    # No date inside, so that the same results give the same bytes.
    drawn.savefig(buffer, format=kind, dpi=180, metadata={"Date": None} if kind == "svg" else {})
    source = picture(buffer.getvalue(), "svg+xml" if kind == "svg" else kind)
    width = round(INCH * drawn.get_figwidth())  # so that letters have one size all over the page
    return _captioned(f'<img style="width:{width}px" src="{source}" alt="{escape(caption, quote=True)}">', caption)


def _captioned(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def image_file(data: bytes, kind: str, caption: str) -> str:
    return _captioned(f'<img src="{picture(data, kind)}" alt="{escape(caption, quote=True)}">', caption)


def flipbook(name: str, sheet: bytes, steps: int, caption: str) -> str:
    """A slider over ``steps`` frames that lie one below the other in one PNG."""
    source = picture(sheet, "png")
    style = f"background-image:url({source});background-size:100% {steps * 100}%"
    slider = f'<input type="range" min="0" max="{steps - 1}" value="0" data-flip="{name}" aria-label="{escape(caption, quote=True)}">'
    return _captioned(f'<div class="flip" id="{name}" style="{style}"></div>{slider}', caption)


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of plain values; numbers to the right."""
    rows = [list(r) for r in rows]
    numeric = [all(isinstance(r[k], int | float) or _is_number(r[k]) for r in rows) for k in range(len(rows[0]))] if rows else []
    cell = [' class="n"' if n else "" for n in numeric]
    top = "<tr>" + "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(cell, head, strict=True)) + "</tr>" if head and rows else ""
    body = "".join("<tr>" + "".join(f"<td{c}>{escape(number(v))}</td>" for c, v in zip(cell, r, strict=True)) + "</tr>" for r in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def number(value: Any) -> str:
    """A value as people write it: four significant digits, thousands apart, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and value.replace(",", "").replace(".", "").replace(" ", "").rstrip("%").isdigit()


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def story(value: Any, depth: int = 0) -> str:
    """Any JSON as tables: mappings by key, lists of mappings by column, long lists of numbers by their mean and range."""
    if isinstance(value, Mapping):
        flat = [(k, v) for k, v in value.items() if not isinstance(v, Mapping | list)]
        out = table([(str(k).replace("_", " "), v) for k, v in flat]) if flat else ""
        nested = [(k, v) for k, v in value.items() if isinstance(v, Mapping | list) and v]
        return out + "".join(
            (heading(str(k).replace("_", " ")) if depth < 2 else text(str(k))) + story(v, depth + 1) for k, v in nested
        )
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        keys = [k for k in value[0] if not isinstance(value[0][k], Mapping | list)]
        return table([[v.get(k) for k in keys] for v in value], [str(k).replace("_", " ") for k in keys]) if keys else ""
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        if len(value) <= 8:
            return text(", ".join(number(v) for v in value))
        return text(f"{len(value)} values, mean {number(sum(value) / len(value))}, from {number(min(value))} to {number(max(value))}")
    if isinstance(value, list):
        return "".join(text(str(v)) for v in value if not isinstance(v, list | Mapping))
    return text(number(value))


def page(title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]]) -> str:
    """The whole document; ``tiles`` are (value, name), ``sections`` are (title, content)."""
    shown = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in tiles)
    links = "".join(f'<a href="#s{k}">{escape(t)}</a>' for k, (t, _) in enumerate(sections))
    body = "".join(f'<section id="s{k}"><h2>{escape(t)}</h2>{c}</section>' for k, (t, c) in enumerate(sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><div class="in"><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><div class="tiles">{shown}</div></div></header>'
        f"<nav><div>{links}</div></nav><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
