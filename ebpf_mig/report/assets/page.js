// SPDX-License-Identifier: Apache-2.0
// What all pages share: explanations of terms beside the word that has the pointer or the focus; all is open in print.
"use strict";
const besidePointer = (box, left, top, bottom) => {
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect(), room = document.documentElement.clientWidth;
  box.style.left = Math.max(4, Math.min(left, room - width - 4)) + "px";
  box.style.top = (bottom + height + 4 <= window.innerHeight ? bottom : Math.max(4, top - height)) + "px";
};
(() => {
  const hint = document.getElementById("hint");
  let shown = null;
  const hide = () => { hint.hidden = true; shown = null; };
  const show = (term) => {
    const about = document.getElementById(term.getAttribute("aria-describedby"));
    if (!about) return;
    shown = term;
    hint.textContent = about.textContent;
    const place = term.getBoundingClientRect();
    besidePointer(hint, place.left, place.top - 4, place.bottom + 4);
  };
  const termOf = (event) => (event.target.closest ? event.target.closest(".term") : null);
  for (const name of ["pointerover", "focusin", "click"])
    document.addEventListener(name, (event) => { const term = termOf(event); if (term) show(term); });
  document.addEventListener("pointerout", (event) => {
    const to = event.relatedTarget;
    if (termOf(event) && !(to && hint.contains(to))) hide();
  });
  hint.addEventListener("pointerleave", hide);
  document.addEventListener("focusout", (event) => { if (termOf(event)) hide(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && shown) hide(); });
  document.addEventListener("scroll", hide, { capture: true, passive: true });

  // What does not fit although it should can be reached with the keyboard.
  const reachable = () => {
    for (const box of document.querySelectorAll(".scroll")) {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      if (!scrolls) { for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name); continue; }
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", "Table " + box.firstElementChild.id);
    }
  };
  new ResizeObserver(reachable).observe(document.body);
  document.addEventListener("toggle", reachable, true);

  let opened = [];
  window.addEventListener("beforeprint", () => {
    hide();
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
