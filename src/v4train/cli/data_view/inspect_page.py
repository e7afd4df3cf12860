"""A step as one HTML page: rows, their segments, text by token, pictures, sound.

Three things are told at once and never by colour alone: the segment by a block with a heading, the modality by what is shown (a
letter, a picture, a player), and what the loss asks for by the line under a token (dotted: never asked for). The tint of the text is
the reader's choice among the three. The strip above a row holds all three for the whole row, also where the page leaves text out.
"""

import html
import itertools

import numpy as np

from v4train.cli.data_view import inspect_script, media_uri, words
from v4train.cli.html_page import frame, style, table
from v4train.data.inspection import look as look_lib
from v4train.data.inspection import rows as rows_lib

_TINTS = {"segment": "segment", "modality": "modality", "loss": "loss weight"}
_SEGMENT_HUES = 7  # the eighth is grey
_NOTHING, _INK = -1, 99  # in place of a hue
_COLUMNS = 1_200  # of a strip
_SMALLEST, _LARGEST = 96, 320  # px, shorter side of a thumbnail that is enlarged, longer side at most
_HINT = "Point at a token, or reach a text with Tab and move with the arrow keys, to see its ids and what it predicts."
_APPROXIMATE = (
    "Sounds are an approximation: the 16 levels and 80 bands of a frame are turned back into sound without a trained vocoder "
    "(phases by Griffin and Lim). The picture beside a player shows the exact levels that the model reads."
)
RULES = """
main{padding-bottom:90px}
.row{margin-top:14px}
.strip{display:grid;grid-template-columns:max-content 1fr;gap:3px 10px;align-items:center;margin:8px 0 12px}
.strip span{font-size:12px;color:var(--soft)}
.strip svg{display:block;width:100%;height:11px;background:var(--panel)}
.strip rect{fill:var(--c)}
.ink{--c:var(--ink)}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;background:var(--c);margin:0 5px 0 12px}
article{border-left:4px solid var(--c);padding:1px 0 1px 14px;margin:12px 0}
article h4{margin:0 0 3px;font-size:13px;font-weight:600;color:var(--c)}
article h4 span{color:var(--soft);font-weight:400}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font:13.5px/1.75 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.tokens:focus-visible{outline:2px solid var(--c0);outline-offset:3px}
.tokens b{font-weight:inherit;unicode-bidi:isolate;padding:1px 0}
.tokens b.n{text-decoration:underline dotted 1.5px var(--soft);text-underline-offset:4px}
.tokens b.s{font-size:11.5px;border:1px solid var(--rule);border-radius:4px;padding:0 3px;margin:0 1px;color:var(--soft)}
.tokens b.at,.tokens b:hover{outline:2px solid var(--ink);outline-offset:0;border-radius:2px}
.edges b{box-shadow:inset -1px 0 var(--rule)}
main:has([value=segment]:checked) .tokens b{background:color-mix(in srgb,var(--c) 15%,transparent)}
main:has([value=modality]:checked) .tokens b{background:color-mix(in srgb,var(--c0) 15%,transparent)}
main:has([value=modality]:checked) .tokens b.n.s{background:none}
main:has([value=loss]:checked) .tokens b{background:color-mix(in srgb,var(--c2) calc(var(--w,1)*28%),transparent)}
main:has([value=loss]:checked) .tokens b.n{background:none;color:var(--soft)}
.media{display:inline-block;vertical-align:middle;margin:6px 8px 6px 2px;padding:5px 8px 7px;max-width:100%}
.media{border:2px solid var(--c);border-radius:6px;white-space:normal;font:12.5px/1.4 system-ui,sans-serif}
.media figcaption{margin:0 0 4px;color:var(--soft);max-width:36ch}
.media div{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center}
.media img{image-rendering:pixelated;display:block;max-width:100%}
.media audio{height:34px;max-width:260px}
.gap{margin:12px 0;padding:5px 14px;font-size:13px;color:var(--soft);border:1px dashed var(--rule);border-radius:6px;
background:repeating-linear-gradient(135deg,transparent 0 7px,var(--panel) 7px 14px)}
.gap.hole{border-color:var(--c1);color:var(--ink)}
.key{display:inline-flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);align-items:center}
.key .tokens{line-height:1.3}
.detail{position:fixed;left:0;right:0;bottom:0;z-index:4;margin:0;padding:9px 30px;background:var(--panel);border-top:1px solid var(--rule);
font-size:13.5px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
@media print{.detail,audio{display:none}}
"""


def page(look: look_lib.Look, *, name: str, heading: str, window: tuple[int, int], batch_rows: int) -> str:
    """The whole document; ``batch_rows`` are those of the global batch."""
    notes = [words.bad(bad) for bad in look.bad]
    if any(isinstance(part, rows_lib.Sound) for row in look.rows for segment in row.segments for part in segment.parts):
        notes.append(_APPROXIMATE)
    rows = "".join(_row(row, window=window) for row in look.rows)
    body = (
        f"<header><h1>{html.escape(name)}: step {look.step:,}</h1>"
        f'<p class="sub">What the model sees. {html.escape(words.visible(heading))}.'
        f" Data fingerprint <code>{html.escape(look.fingerprint[:12])}</code>.</p></header>"
        f"{frame.notes(notes)}{_tiles(look, batch_rows=batch_rows)}{_controls()}{rows}"
        f'<p class="detail" aria-live="polite">{_HINT}</p>'
    )
    return frame.document(body, title=f"{name}: step {look.step}", sheet=style.sheet(RULES), script=inspect_script.SOURCE)


def _tiles(look: look_lib.Look, *, batch_rows: int) -> str:
    rows = look.rows
    places = sum(row.length for row in rows)
    tokens = {kind: sum(row.tokens[kind] for row in rows) for kind in rows_lib.MODALITIES}
    bad = sum(row.bad for row in rows)
    figures = [
        ("Rows shown", f"{len(rows)}", f"of {batch_rows:,} in the batch"),
        *((f"{kind.capitalize()} tokens", f"{n:,}", f"{n / places:.1%} of the places") for kind, n in tokens.items() if n),
        ("Fill", f"{sum(tokens.values()) / places:.1%}", "the rest is padding"),
        ("Segments", f"{sum(row.segment_count for row in rows):,}", "documents or parts"),
        ("In the loss", f"{sum(row.targets for row in rows):,}", "targets of the next token"),
        *([("Unreadable", f"{bad:,}", "documents, as padding")] if bad else []),
    ]
    return table.tiles(figures)


def _controls() -> str:
    key = (
        '<span class="key"><span class="tokens"><b>abc</b></span> asked for by the loss '
        '<span class="tokens"><b class="n">abc</b></span> not asked for '
        '<span class="tokens"><b class="n s">&lt;mark&gt;</b></span> special token'
        f'{"".join(f"""<span><i class="c{i}"></i>{name}</span>""" for i, name in enumerate(rows_lib.MODALITIES))}</span>'
    )
    return f'<form class="controls">{frame.radio("tint", _TINTS, label="Tint by")}{key}</form>'


def _row(row: rows_lib.Row, *, window: tuple[int, int]) -> str:
    heading = f"Row {row.number} · {row.source}"
    pieces = "".join(_piece(piece, row=row) for piece in words.pieces(row, window=window))
    return frame.section(heading, f'<div class="row"><p class="sub">{html.escape(words.row(row))}</p>{_strip(row)}{pieces}</div>')


def _strip(row: rows_lib.Row) -> str:
    """Three bands over all places of the row. Of more places than columns, each column shows the first that it stands for."""
    at = np.unique(np.linspace(0, row.length, min(row.length, _COLUMNS), endpoint=False).astype(int))
    real = row.segment_ids[at] > 0
    segments = np.where(real, (row.segment_ids[at] - 1) % _SEGMENT_HUES, _NOTHING)
    modality = np.where(real, row.modality[at], _NOTHING)
    loss = np.where(row.asked[at] > 0, _INK, _NOTHING)
    bands = (("segments", segments), ("modality", modality), ("in the loss", loss))
    drawn = "".join(f"<span>{name}</span>{_band(name, values)}" for name, values in bands)
    return f'<div class="strip">{drawn}</div>'


def _band(name: str, hues: np.ndarray) -> str:
    edges = [0, *(np.flatnonzero(np.diff(hues)) + 1).tolist(), len(hues)]
    runs = [(a, b, "ink" if hues[a] == _INK else f"c{hues[a]}") for a, b in itertools.pairwise(edges) if hues[a] != _NOTHING]
    cells = "".join(f'<rect class="{hue}" x="{a}" width="{b - a}" height="1"/>' for a, b, hue in runs)
    return f'<svg viewBox="0 0 {len(hues)} 1" preserveAspectRatio="none" role="img" aria-label="{name} along the row">{cells}</svg>'


def _piece(piece: words.Piece, *, row: rows_lib.Row) -> str:
    if isinstance(piece, str):
        return f'<p class="gap">{html.escape(piece)}</p>'
    if isinstance(piece, tuple):
        hole = " hole" if piece[1] < row.length else ""
        return f'<p class="gap{hole}">{html.escape(words.gap(row, *piece))}</p>'
    texts = [part for part in piece.parts if isinstance(part, rows_lib.Text) and not part.special]
    edges = " edges" if texts and sum(len(part.text) for part in texts) > 1.5 * len(texts) else ""
    content = "".join(_part(part) for part in piece.parts)
    return (
        f'<article class="c{(piece.number - 1) % _SEGMENT_HUES}" data-segment="{piece.number}" data-start="{piece.start}" '
        f'data-position="{piece.position}"><h4>Segment {piece.number} <span>{html.escape(words.segment(piece))}</span></h4>'
        f'<div class="tokens{edges}" tabindex="0" role="group" aria-label="Tokens of segment {piece.number}">{content}</div></article>'
    )


def _part(part: rows_lib.Part) -> str:
    if isinstance(part, rows_lib.Text):
        weight = "" if part.asked == 1 else f' data-w="{part.asked:g}"'
        tint = f' style="--w:{min(part.asked, 1):.3g}"' if 0 < part.asked != 1 else ""
        kinds = " ".join([*([] if part.asked else ["n"]), *(["s"] if part.special else [])])
        classes = f' class="{kinds}"' if kinds else ""
        ids = " ".join(map(str, part.ids))
        return f'<b{classes} data-p="{part.place}" data-i="{ids}"{weight}{tint}>{html.escape(words.visible(part.text))}</b>'
    what = words.image(part) if isinstance(part, rows_lib.Image) else words.sound(part)
    caption = f"{what}; place {part.place:,}, {words.count(part.n, 'token')}, not asked for"
    hue, content = ("c1", _image(part, what=what)) if isinstance(part, rows_lib.Image) else ("c2", _sound(part, what=what))
    return f'<figure class="media {hue}"><figcaption>{html.escape(caption)}</figcaption><div>{content}</div></figure>'


def _image(part: rows_lib.Image, *, what: str) -> str:
    height, width = _thumbnail(part.pixels.shape[0], part.pixels.shape[1])
    return f'<img src="{media_uri.picture(part)}" width="{width}" height="{height}" alt="{html.escape(what)}">'


def _sound(part: rows_lib.Sound, *, what: str) -> str:
    width = min(300, max(60, 8 * part.n))
    return (
        f'<img src="{media_uri.spectrogram(part)}" width="{width}" height="60" alt="dMel levels, time to the right">'
        f'<audio controls preload="metadata" src="{media_uri.speech(part)}" aria-label="{html.escape(what)}"></audio>'
    )


def _thumbnail(height: int, width: int) -> tuple[int, int]:
    """Small images are enlarged by a whole factor, so that their pixels can be seen; large ones are fitted in."""
    factor = max(1, -(-_SMALLEST // min(height, width)))
    factor = max(1, min(factor, _LARGEST // max(height, width)))
    scale = min(factor, _LARGEST / max(height, width)) if factor == 1 else factor
    return round(height * scale), round(width * scale)
