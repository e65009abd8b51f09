// SPDX-License-Identifier: Apache-2.0
// The timeline: lanes of slices on a canvas, zoomed and dragged. Draws only what is in view, and no slice that would
// fall on a pixel that is painted already, so that the number of events does not matter.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("timeline");
  const canvas = document.createElement("canvas");
  const paper = canvas.getContext("2d");
  const tip = document.getElementById("tip");
  const rows = document.querySelector("#calls tbody");
  const AXIS = 22, LIMIT = 200, STRIDE = 4;
  const whole = [Math.min(data.range[0], 0), Math.max(data.range[1], data.window || 1)];
  const around = data.window === null ? whole : [-0.05 * data.window, 1.05 * data.window];
  let [from, to] = around;
  let width = 0, gutter = 0, row = 0, colours = {}, queued = false;

  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Timeline; the calls in view are in the table below it");
  box.append(canvas);

  const ms = (ns) => (ns / 1e6).toFixed(3) + " ms";
  const x = (ns) => gutter + ((ns - from) / (to - from)) * (width - gutter);
  const at = (px) => from + ((px - gutter) / (width - gutter)) * (to - from);

  // On paper the colours are light, whatever the screen's are.
  function readColours(onPaper) {
    const light = document.createElement("div");
    light.className = "light";
    document.body.append(light);
    const style = getComputedStyle(onPaper ? light : document.documentElement);
    for (const name of ["page", "text", "soft", "line", "band", "blackout", "source", "destination", "both", "unknown",
      "vcpu", "ioctl", "socket", "wait", "slot", "segment", "mark", "warn"])
      colours[name] = style.getPropertyValue("--" + name).trim();
    light.remove();
  }

  function layout() {
    const phone = window.innerWidth < 600;
    width = box.clientWidth;
    gutter = phone ? 0 : 210;
    row = phone ? 30 : 18;
    const height = AXIS + row * data.lanes.length + 4, scale = window.devicePixelRatio || 1;
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * scale);
    canvas.height = Math.min(Math.round(height * scale), 32000);
    paper.setTransform(scale, 0, 0, canvas.height / height, 0, 0);
    redraw();
  }

  // The first slice of a lane that ends after `ns`: slices are in order and do not overlap.
  function firstAfter(v, ns) {
    let low = 0, high = v.length / STRIDE;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (v[middle * STRIDE + 1] < ns) low = middle + 1; else high = middle;
    }
    return low;
  }

  function axis() {
    const span = to - from, rough = span / Math.max(2, (width - gutter) / 110);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    paper.fillStyle = colours.soft;
    paper.strokeStyle = colours.line;
    paper.textAlign = "left";
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
      const px = Math.round(x(t)) + 0.5;
      paper.beginPath();
      paper.moveTo(px, 0);
      paper.lineTo(px, canvas.height);
      paper.stroke();
      const digits = Math.max(0, -Math.floor(Math.log10(step / 1e6) + 1e-9));
      paper.fillText((t / 1e6).toFixed(digits) + " ms", px + 3, AXIS / 2);
    }
  }

  // A label too long for its place loses its middle: what tells lanes apart is at its ends.
  function fitted(label, room) {
    for (let keep = label.length; keep > 8; keep -= 1) {
      const text = keep === label.length ? label : label.slice(0, keep >> 1).trimEnd() + "…" + label.slice(-(keep >> 1)).trimStart();
      if (paper.measureText(text).width <= room) return text;
    }
    return label.slice(0, 8);
  }

  function lane(one, top) {
    const v = one.v, inner = gutter ? row - 4 : row - 16, y = gutter ? top + 2 : top + 14;
    let painted = -1;
    for (let i = firstAfter(v, from) * STRIDE; i < v.length && v[i] <= to; i += STRIDE) {
      const left = Math.max(x(v[i]), gutter), right = Math.min(Math.max(x(v[i + 1]), left + 1), width);
      if (right <= painted) continue;
      paper.fillStyle = colours[one.kind === "phase" ? data.sides[v[i + 2]] || "both" : one.kind] || colours.both;
      paper.fillRect(left, y, right - left, inner);
      painted = Math.ceil(right);
      const name = data.names[v[i + 2]];
      if (right - left > 7 * name.length + 6) {
        paper.fillStyle = colours.page;
        paper.fillText(name, left + 3, y + inner / 2 + 0.5);
      }
      if (one.kind === "phase" && right < width) {
        paper.fillStyle = colours.page;
        paper.fillRect(right - 0.5, y, 0.5, inner);
      }
    }
    paper.fillStyle = colours.text;
    if (gutter) {
      paper.fillText(fitted(one.label, gutter - 12), 4, top + row / 2);
    } else {
      paper.fillText(one.label, 4, top + 7);
    }
  }

  function draw() {
    queued = false;
    paper.fillStyle = colours.page;
    paper.fillRect(0, 0, width, canvas.height);
    paper.font = "12px system-ui, sans-serif";
    paper.textBaseline = "middle";
    data.lanes.forEach((_, i) => {
      if (i % 2) { paper.fillStyle = colours.band; paper.fillRect(0, AXIS + i * row, width, row); }
    });
    if (data.blackout) {
      const left = Math.max(x(data.blackout[0]), gutter);
      paper.fillStyle = colours.blackout;
      paper.fillRect(left, 0, Math.max(0, Math.min(x(data.blackout[1]), width) - left), canvas.height);
    }
    axis();
    data.lanes.forEach((one, i) => lane(one, AXIS + i * row));
    listing();
  }

  // The same as a table: what is in view, lane by lane, up to a limit.
  function listing() {
    const made = [];
    let count = 0;
    for (const one of data.lanes) {
      for (let i = firstAfter(one.v, from) * STRIDE; i < one.v.length && one.v[i] <= to; i += STRIDE) {
        count += 1;
        if (made.length >= LIMIT) continue;
        const tr = document.createElement("tr");
        const cells = [one.label, data.names[one.v[i + 2]], (one.v[i] / 1e6).toFixed(3),
          ((one.v[i + 1] - one.v[i]) / 1e6).toFixed(3), data.notes[one.v[i + 3]]];
        cells.forEach((text, at) => {
          const td = document.createElement("td");
          td.textContent = text;
          td.dataset.label = ["lane", "call", "at ms", "ms", "details"][at];
          if (at === 2 || at === 3) td.className = "n";
          tr.append(td);
        });
        made.push(tr);
      }
    }
    rows.replaceChildren(...made);
    document.getElementById("count").textContent =
      count + (count === 1 ? " call" : " calls") + " in view" + (count > LIMIT ? ", the first " + LIMIT + " listed" : "");
  }

  function redraw() {
    if (!queued) { queued = true; requestAnimationFrame(draw); }
  }

  function zoom(factor, ns) {
    const span = Math.min(Math.max((to - from) * factor, 100), (whole[1] - whole[0]) * 1.2);
    const share = (ns - from) / (to - from);
    from = ns - span * share;
    to = from + span;
    redraw();
  }

  function move(ns) {
    const span = to - from;
    from = Math.min(Math.max(from + ns, whole[0] - span / 2), whole[1] - span / 2);
    to = from + span;
    redraw();
  }

  let pointer = null;  // where the pointer is over the canvas, in px from its left

  function leave() { pointer = null; tip.hidden = true; }

  function point(event) {
    const area = canvas.getBoundingClientRect();
    const index = Math.floor((event.clientY - area.top - AXIS) / row), px = event.clientX - area.left;
    pointer = px;
    const one = data.lanes[index];
    if (!one) { tip.hidden = true; return; }
    const slack = 3 * (to - from) / width, ns = at(px);
    const i = firstAfter(one.v, ns - slack) * STRIDE;
    if (px >= gutter && i < one.v.length && one.v[i] <= ns + slack)
      tip.textContent = one.label + ": " + data.names[one.v[i + 2]] + " from " + ms(one.v[i]) + " for " +
        ms(one.v[i + 1] - one.v[i]) + (data.notes[one.v[i + 3]] ? "; " + data.notes[one.v[i + 3]] : "");
    else
      tip.textContent = px < gutter ? one.label : one.label + " at " + ms(ns);
    besidePointer(tip, event.clientX + 14, event.clientY - 10, event.clientY + 16);
  }

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event.clientX);
    canvas.setPointerCapture(event.pointerId);
    point(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (before === undefined) { point(event); return; }
    const left = canvas.getBoundingClientRect().left;
    if (fingers.size === 1) {
      move(((before - event.clientX) / (width - gutter)) * (to - from));
    } else if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = Math.abs(event.clientX - other);
      if (apart > 5) zoom(Math.max(Math.abs(before - other), 1) / apart, at(other - left));
    }
    fingers.set(event.pointerId, event.clientX);
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(Math.exp(event.deltaY / 300), at(event.clientX - canvas.getBoundingClientRect().left));
    } else if (event.deltaX) {
      event.preventDefault();
      move((event.deltaX / width) * (to - from));
    }
  }, { passive: false });
  const keys = document.getElementById("keys");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) return;
    const span = to - from, centre = pointer === null ? (from + to) / 2 : at(Math.max(pointer, gutter));
    const onCanvas = { "+": () => zoom(0.5, centre), "=": () => zoom(0.5, centre), "-": () => zoom(2, centre),
      ArrowLeft: () => move(-span / 8), ArrowRight: () => move(span / 8), Home: () => show(around) };
    const anywhere = { w: () => zoom(0.8, centre), s: () => zoom(1.25, centre), a: () => move(-span / 10),
      d: () => move(span / 10), "?": () => keys.showModal() };
    const act = anywhere[event.key.toLowerCase()] || (event.target === canvas ? onCanvas[event.key] : undefined);
    if (act) { event.preventDefault(); act(); }
  });

  function show(range) { [from, to] = range; redraw(); }
  const buttons = { "zoom-in": () => zoom(0.5, (from + to) / 2), "zoom-out": () => zoom(2, (from + to) / 2),
    "show-window": () => show(around), "show-all": () => show(whole),
    "show-keys": () => keys.showModal() };
  for (const [id, act] of Object.entries(buttons)) document.getElementById(id).addEventListener("click", act);

  window.addEventListener("beforeprint", () => { leave(); readColours(true); draw(); });
  window.addEventListener("afterprint", () => { readColours(); redraw(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
  new ResizeObserver(layout).observe(box);
  readColours();
  layout();
})();
