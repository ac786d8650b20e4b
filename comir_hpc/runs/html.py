"""Results in a notebook: the table that ``_repr_html_`` of a typed result returns."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def table(title: str, rows: Mapping[str, object]) -> str:
    """Give an HTML table of two columns under a title, without empty rows; all text is escaped."""
    body = "".join(
        f'<tr><th style="text-align:left">{escape(str(name))}</th>'
        f'<td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
        if value != ""
    )
    return f"<div><strong>{escape(title)}</strong><table>{body}</table></div>"
