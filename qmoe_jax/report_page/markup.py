# SPDX-License-Identifier: Apache-2.0
"""Pieces of `report.html`; what they take is text, and escaped, unless they say that it is HTML."""

import html
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    """Any value as HTML's text."""
    return html.escape(str(value))


def number(value: int | float | None, spec: str) -> str:
    """A number by a format, or a dash."""
    return "–" if value is None else format(value, spec)


def section(title: str, *content: str) -> str:
    """A part of the page; `content` is HTML."""
    return f"<section><h2>{text(title)}</h2>\n{''.join(content)}</section>"


def pair(*content: str) -> str:
    """HTML side by side where there is room, else one below the other."""
    return f'<div class="pair">{"".join(content)}</div>\n'


def figure(title: str, content: str, note: str = "", keys: Sequence[str] = ()) -> str:
    """HTML `content` (a plot, a table) with its title, the names of its series, a note below."""
    named = "".join(
        f'<span class="key k{min(n, 2)}">{text(key)}</span>' for n, key in enumerate(keys)
    )
    below = f'<p class="note">{text(note)}</p>' if note else ""
    return (
        f"<figure><figcaption><h3>{text(title)}</h3>{named}</figcaption>{content}{below}</figure>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """A table whose first column names its rows; `kind` is "numbers" or "words"."""
    above = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    thead = f"<thead><tr>{above}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    return f'<div class="wide"><table class="{kind}">{thead}<tbody>\n{body}</tbody></table></div>\n'


def code(lines: str) -> str:
    """Lines to copy."""
    return f'<pre tabindex="0"><code>{text(lines)}</code></pre>\n'
