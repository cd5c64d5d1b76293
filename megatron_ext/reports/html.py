"""HTML pages that need no other file: the frame, tables and pictures they share."""

import base64
import html

STYLE = """
:root { color-scheme: light dark;
        --page: light-dark(#fff, #16181b); --ink: light-dark(#222, #e3e3e3);
        --faint: light-dark(#666, #a0a0a0); --line: light-dark(#ddd, #3a3d42);
        --accent: light-dark(#0072B2, #56B4E9); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.summary { font-size: 1.15rem; margin: .3rem 0 1.5rem; }
img { width: 100%; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
blockquote { margin: 0; padding: .2rem 1rem; border-left: 3px solid var(--accent);
             white-space: pre-wrap; }
.note { color: var(--faint); font-size: .9rem; }
"""
# Nothing is fetched, whatever the page holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: list[str], style: str = "", scripts: bool = False) -> str:
    """A page of HTML `parts`; the title is text, and empty parts are left out.

    Args:
        scripts: whether those in the parts may run.
    """
    policy = f"{_POLICY}; script-src 'unsafe-inline'" if scripts else _POLICY
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def picture(png: bytes, description: str) -> str:
    """An image that the page holds itself."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is words and whose others, under a header, are numbers."""

    def line(tag: str, cells: list[str]) -> str:
        kinds = ["", *([' class="number"' if header else ""] * (len(cells) - 1))]
        return (
            "<tr>"
            + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells))
            + "</tr>"
        )

    head = line("th", header) if header else ""
    return f"<table>{head}{''.join(line('td', row) for row in rows)}</table>"
