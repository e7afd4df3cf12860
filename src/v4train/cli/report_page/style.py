"""The rules of the report's own parts: curves, crosshair, heat map.

The colours of the heat map are mixed here from three anchors, in as many steps as `heat_map` has classes.
"""

from v4train.cli.html_page import style
from v4train.cli.report_page import heat_map

HEAT_LIGHT = ("#08519c", "#6aaed6", "#f3f2ee", "#f0924a", "#a63603")  # from 1/4 over 1/2, 1, 2 to 4 times the uniform load
HEAT_DARK = ("#a5d4ff", "#3f86c6", "#2d3137", "#c8641f", "#ffbe8c")


def sheet() -> str:
    """The whole style sheet."""
    classes = "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(heat_map.STEPS))
    return style.sheet(classes + RULES, light=f"--never:#1c2026;{_heat(HEAT_LIGHT)}", dark=f"--never:#fff;{_heat(HEAT_DARK)}")


def _heat(anchors: tuple[str, ...]) -> str:
    return "".join(f"--h{i}:{_mix(anchors, i / (heat_map.STEPS - 1))};" for i in range(heat_map.STEPS))


def _mix(anchors: tuple[str, ...], place: float) -> str:
    """The colour at 0 <= place <= 1 along the anchors."""
    whole = min(int(place * (len(anchors) - 1)), len(anchors) - 2)
    part = place * (len(anchors) - 1) - whole
    pairs = (tuple(int(colour[i : i + 2], 16) for colour in anchors[whole : whole + 2]) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


RULES = """
.cells-of{display:block;width:100%;height:auto}
.status{font-size:13px;font-weight:600;padding:1px 9px;border-radius:10px;border:1px solid currentColor;color:var(--soft)}
.status.finished{color:var(--c2)}
.status.stopped,.status.unfinished{color:var(--c1)}
th .swatch{margin-right:7px}
thead th:has(.swatch){color:var(--ink);font-weight:600;white-space:normal;overflow-wrap:anywhere;min-width:120px}
.heat{margin-top:30px}
.heat-legend text{text-anchor:middle}
text.row-name,text.row-max,text.max-head{text-anchor:end}
text.row-name{fill:var(--ink)}
path.line,path.marked,path.points,path.raw{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}
path.line,path.marked{stroke-width:1.8}
path.raw{stroke-width:1;opacity:.28}
path.points{stroke-width:1.2;stroke-dasharray:1 3.5;opacity:.9}
path.mark{fill:var(--c);stroke:var(--page);stroke-width:1}
path.event{stroke:var(--c);fill:var(--c);fill-opacity:.14;stroke-width:1;stroke-dasharray:2 3}
path.event:not(.of-run){--c:var(--soft)}
path.rollback:not(.of-run){--c:var(--c1)}
path.rollback{stroke-dasharray:none;stroke-opacity:.55}
.cross path{stroke:var(--soft);stroke-dasharray:3 3;fill:none}
.cross circle{fill:var(--c);stroke:var(--page);stroke-width:1.5}
.tip{position:absolute;top:10px;z-index:2;pointer-events:none;padding:6px 10px}
.tip{background:var(--page);border:1px solid var(--rule);border-radius:6px;box-shadow:0 2px 10px #0003}
.tip{font-size:12.5px;line-height:1.4;font-variant-numeric:tabular-nums;white-space:nowrap}
.tip b{display:block;font-weight:600;margin-bottom:2px}
.tip div{display:flex;gap:14px;justify-content:space-between}
.tip i{display:inline-block;width:9px;height:9px;border-radius:2px;background:var(--c);margin-right:6px}
.heat-head{display:flex;flex-wrap:wrap;gap:8px 24px;justify-content:space-between;align-items:center;margin:6px 0}
.heat-legend{display:flex;align-items:flex-start;gap:16px;font-size:12px;color:var(--soft)}
.never-key{display:inline-flex;gap:6px;align-items:center;line-height:12px}
.heat-legend svg{flex:none}
.never{fill:var(--never)}
.gap{fill:none;stroke:var(--grid)}
.cells rect:hover{stroke:var(--ink);stroke-width:1.5}
.cells-of{min-width:700px}
@media print{.heat-choice,.tip{display:none!important}.cells-of{min-width:0}}
"""
