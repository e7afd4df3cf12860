"""The script of the inspection page: says everything about the token under the pointer or the keyboard's cursor.

Without it the page shows all the same, but for the ids.
"""

SOURCE = r"""
"use strict";
(() => {
const bar = document.querySelector(".detail"), hint = bar.textContent;
let at = null;
const quote = b => "“" + b.textContent.replace(/\n/g, "") + "”";
const times = w => w === "0" ? "not asked for" : "weight " + w;
function show(b) {
  at?.classList.remove("at");
  at = b;
  if (!b) { bar.textContent = hint; return; }
  b.classList.add("at");
  const segment = b.closest("[data-segment]"), place = +b.dataset.p, ids = b.dataset.i.split(" ");
  const position = +segment.dataset.position + place - +segment.dataset.start;
  const all = [...segment.querySelectorAll("b[data-p]")], next = all[all.indexOf(b) + 1];
  const parts = [quote(b), (ids.length > 1 ? "ids " : "id ") + ids.join(", "), "place " + place, "position " + position,
    "as a target: " + times(b.dataset.w ?? "1")];
  if (next && +next.dataset.p === place + ids.length) parts.push("predicts " + quote(next) + ", " + times(next.dataset.w ?? "1"));
  else if (next) parts.push("predicts a placeholder, not asked for");
  else parts.push("predicts nothing: the segment ends");
  bar.textContent = parts.join("  ·  ");
}
for (const text of document.querySelectorAll(".tokens")) {
  text.addEventListener("pointerover", event => { const b = event.target.closest("b[data-p]"); if (b) show(b); });
  text.addEventListener("pointerleave", () => show(null));
  text.addEventListener("blur", () => show(null));
  text.addEventListener("focus", () => { if (text.matches(":focus-visible")) show(text.querySelector("b[data-p]")); });
  text.addEventListener("keydown", event => {
    const all = [...text.querySelectorAll("b[data-p]")], i = all.indexOf(at);
    const to = {ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: all.length - 1}[event.key];
    if (event.key === "Escape") show(null);
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    show(all[to]);
    all[to].scrollIntoView({block: "nearest"});
  });
}
})();
"""
