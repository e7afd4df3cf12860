"""The document around a page: one file that refers to nothing outside itself, and that could not if it wanted to.

A page shows what others wrote (texts of a corpus, names of runs), so besides escaping every text the document carries a *content
security policy*: nothing is loaded from anywhere, images and sound come from ``data:`` addresses, and the only script that runs is
the page's own, named by its SHA-256. A text that slipped through the escaping would still not run. Style attributes are allowed,
since without loading they can do no more than look odd.
"""

import base64
import hashlib
import html
import pathlib

from v4train.cli.html_page import style


def document(body: str, *, title: str, sheet: str | None = None, script: str = "", data: dict[str, str] | None = None) -> str:
    """A complete HTML document.

    Args:
        body: HTML of the page, everything in it escaped.
        title: as text.
        sheet: the style sheet; by default the shared one.
        script: the source of the page's script, "" for none.
        data: id -> JSON for the script, already made safe by `json_text`.
    """
    blocks = "".join(f'<script type="application/json" id="{name}">{text}</script>\n' for name, text in (data or {}).items())
    run = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{style.sheet('') if sheet is None else sheet}</style></head>\n"
        f"<body><main>{body}</main>\n{blocks}{run}</body></html>\n"
    )


def policy(script: str) -> str:
    """The content security policy of a page with this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if script else "'none'"
    rest = "style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {scripts}; {rest}"


def section(heading: str, content: str) -> str:
    """A headed part of a page, or nothing if it is empty. ``heading`` is text, ``content`` HTML."""
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>" if content else ""


def notes(texts: tuple[str, ...] | list[str]) -> str:
    """What the reader must know before believing the rest, as a list; "" without any."""
    return f'<ul class="notes">{"".join(f"<li>{html.escape(text)}</li>" for text in texts)}</ul>' if texts else ""


def radio(name: str, options: dict[str, str], *, label: str) -> str:
    """A choice of one (value -> text), the first chosen. All arguments must be free of HTML."""
    items = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if i == 0 else ""}><span>{text}</span></label>'
        for i, (value, text) in enumerate(options.items())
    )
    return f'<span class="group">{label}<span class="choice" role="radiogroup" aria-label="{label}">{items}</span></span>'


def write(text: str, *, path: pathlib.Path) -> None:
    """Writes a page, with the folders above it.

    Raises:
        ValueError: the path is a directory or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; give a file, for example {path / 'page.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot write the page ({error.strerror}); give a path that can be written") from error
