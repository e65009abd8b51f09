# SPDX-License-Identifier: Apache-2.0
"""What all HTML pages share: head, style, the list of terms, scripts.

In: a title and HTML fragments. Out: a page that loads nothing and may load nothing (its content security policy
forbids it).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from ebpf_mig.report.embedded import asset
from ebpf_mig.report.terms import glossary
from ebpf_mig.text import printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, body: Sequence[str], data: str = "", scripts: Sequence[str] = ()) -> Iterator[str]:
    """The page. `title` is text, `body` and `data` are HTML; `scripts` are files of `assets/`."""
    shown = html.escape(printable(title, 400))
    yield "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
    yield f"<title>{shown}</title>\n<style>\n{asset('palette.css')}{asset('report.css')}</style>\n</head>\n"
    yield f"<body>\n<main>\n<h1>{shown}</h1>\n"
    yield from body
    yield from section("Terms", "".join(glossary("".join(body))))
    yield f"</main>\n<div id='hint' role='tooltip' hidden></div>\n{data}"
    yield "".join(f"<script>\n{asset(name)}</script>\n" for name in ("page.js", *scripts))
    yield "</body>\n</html>\n"


def section(name: str, body: str) -> Iterator[str]:
    """A part of the page with its heading; nothing without a body."""
    if body:
        anchor = "".join(c if c.isalnum() else "-" for c in name.lower())
        yield f"<section id='part-{anchor}'>\n<h2>{name}</h2>\n{body}</section>\n"
