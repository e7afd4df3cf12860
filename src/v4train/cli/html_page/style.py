"""The style that all pages share: palette, light and dark page, type, tables, tiles, controls, print.

Eight hues that readers with the usual colour deficiencies can tell apart (after Okabe and Ito), darkened for the light page and
lightened for the dark one until each has a contrast of at least 3:1 to the page; text has at least 4.5:1. Print is always light.
An element of class ``c0`` .. ``c7`` has its hue in ``--c``; what is painted with it is for the page's own rules to say.
"""

LIGHT = ("#0072b2", "#d55e00", "#00875f", "#b5508a", "#8a6d00", "#2f8fc4", "#6a4fc0", "#5c636e")
DARK = ("#56b4e9", "#ff8f45", "#2fc998", "#e58fc2", "#e0bd2a", "#9ad4f7", "#b9a2f8", "#aab2bd")
HUES = len(LIGHT)
LIGHT_PAGE = "color-scheme:light;--page:#fff;--ink:#1c2026;--soft:#596170;--rule:#d9dde3;--grid:#e8ebef;--panel:#f6f7f9;"
DARK_PAGE = "color-scheme:dark;--page:#16191d;--ink:#e9ecf0;--soft:#a3abb8;--rule:#3a4049;--grid:#2a2f36;--panel:#1e2227;"


def sheet(rules: str, *, light: str = "", dark: str = "") -> str:
    """The whole style sheet of a page.

    Args:
        rules: of the page itself, after the shared ones.
        light: its own variables for the light page, as declarations.
        dark: the same for the dark page.
    """
    light, dark = f"{LIGHT_PAGE}{_palette(LIGHT)}{light}", f"{DARK_PAGE}{_palette(DARK)}{dark}"
    classes = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(HUES))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}{RULES}{rules}"


def _palette(hues: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(hues))


RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink)}
body{font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 30px 60px}
header{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline}
h1{font-size:25px;line-height:1.25;margin:0;font-weight:650;overflow-wrap:anywhere}
h2{font-size:18px;margin:38px 0 12px;padding-top:14px;border-top:1px solid var(--rule);font-weight:650}
h3{font-size:15px;margin:0;font-weight:600}
.sub{color:var(--soft);margin:2px 0 0;flex-basis:100%}
.notes{margin:16px 0 0;padding:10px 14px 10px 32px;border-left:3px solid var(--c1);background:var(--panel);font-size:14px}
.notes li+li{margin-top:3px}
.tiles{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));max-width:calc(var(--columns)*230px);
gap:14px 22px;margin:22px 0 0}
.tiles div{border-top:2px solid var(--rule);padding-top:7px}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles dd{margin:0;font-size:21px;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.tiles small{display:block;font-size:12.5px;font-weight:400;color:var(--soft);white-space:normal}
.scroll{overflow-x:auto}
.table{margin-top:18px;max-width:max-content}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;white-space:nowrap;font-weight:600;font-size:15px;padding-bottom:6px}
th,td{padding:6px 14px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;font-weight:400}
th:first-child{text-align:left;padding-left:0}
thead th{color:var(--soft);font-size:13px;vertical-align:bottom}
tbody th{font-weight:600}
td.best{font-weight:700}
.texts tbody th{white-space:nowrap!important}
.texts thead th,.texts th,.texts td{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:90px}
td.bar{width:150px;min-width:110px;padding-right:0}
td.bar i{display:block;height:8px;background:var(--c0);opacity:.75;min-width:1px}
.controls{display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center;margin:26px 0 -22px;padding:8px 0}
.controls{position:sticky;top:0;z-index:3;background:var(--page);font-size:14px}
[hidden]{display:none!important}
.choice{display:inline-flex;border:1px solid var(--rule);border-radius:6px;overflow:hidden;font-size:13.5px}
.choice label{cursor:pointer}
.choice input{position:absolute;opacity:0;pointer-events:none}
.choice span{display:block;padding:3px 12px}
.choice label+label span{border-left:1px solid var(--rule)}
.choice label span{white-space:nowrap}
.choice input:checked+span{background:var(--ink);color:var(--page)}
.choice input:focus-visible+span{outline:2px solid var(--c0);outline-offset:-2px}
.controls .group{display:inline-flex;gap:10px;align-items:center;color:var(--soft)}
.controls label{color:var(--ink)}
.grid2{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:30px 34px}
.wide{grid-column:1/-1}
figure{margin:0;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:0 10px;align-items:baseline;margin-bottom:4px}
.unit{color:var(--soft);font-size:13px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 4px;padding:0;font-size:13.5px}
.legend li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.swatch{flex:none;vertical-align:-1px}
.plot{position:relative}
.plot svg{display:block;width:100%;height:auto}
.plot svg:focus-visible,.scroll:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
text.x,text.name{text-anchor:middle}
text.y{text-anchor:end}
path.grid{stroke:var(--grid);fill:none}
path.base{stroke:var(--soft);fill:none}
.remark{color:var(--soft);font-size:13px;margin:4px 0 0}
details{margin-top:12px;border:1px solid var(--rule);border-radius:6px}
summary{cursor:pointer;padding:8px 14px;font-weight:600}
pre{margin:0;padding:4px 14px 14px;overflow-x:auto;font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (max-width:820px){main{padding:18px 16px 40px}.grid2{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:repeat(auto-fill,minmax(128px,1fr));max-width:none}
td.bar{display:none}th,td{padding:6px 9px}}
@media print{body{font-size:11pt}main{max-width:none;padding:0}.controls{display:none!important}
.grid2{grid-template-columns:minmax(0,1fr);gap:18px}.tiles{grid-template-columns:repeat(5,1fr)}
figure,.tiles,tr{break-inside:avoid}h2,figcaption,.legend{break-after:avoid}.scroll{overflow:visible}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}details:not([open]),section:has(>details):not(:has(>details[open])){display:none}}
"""
