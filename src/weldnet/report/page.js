"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("figures").textContent);
  const night = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  let printing = false;

  // -- theme --------------------------------------------------------------------------------------
  const store = {
    get() { try { return localStorage.getItem("weldnet-theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("weldnet-theme", theme); } catch { /* a page from a file may have none */ } },
  };
  const theme = () => (printing ? "light" : root.dataset.theme || (night.matches ? "dark" : "light"));
  const button = document.getElementById("theme");
  function showTheme() {
    const dark = theme() === "dark";
    button.setAttribute("aria-pressed", String(dark));
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
    drawAll();
  }
  if (["light", "dark"].includes(store.get())) root.dataset.theme = store.get();
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    store.set(root.dataset.theme);
    showTheme();
  });
  night.addEventListener("change", showTheme);

  // -- figures ------------------------------------------------------------------------------------
  function colour(token) {
    const [name, opacity] = token.slice(1).split("/");
    const value = data.palettes[theme()][name];
    if (!value || !opacity) return value || token;
    const part = (at) => parseInt(value.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }
  function resolve(value, key = "") {
    if (Array.isArray(value)) return value.map((entry) => resolve(entry, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, resolve(entry, name)]));
    return typeof value === "string" && value[0] === "@" && /color(scale)?$/.test(key) ? colour(value) : value;
  }
  function merge(base, more) {
    const found = { ...base };
    for (const [key, entry] of Object.entries(more)) {
      const both = entry && found[key] && typeof entry === "object" && typeof found[key] === "object";
      found[key] = both && !Array.isArray(entry) ? merge(found[key], entry) : entry;
    }
    return found;
  }

  const hidden = new Map(); // which traces of a figure are switched off
  function draw(plot, width) {
    const figure = data.figures[plot.dataset.figure];
    const off = hidden.get(plot) || new Set();
    const traces = resolve(figure.traces).map((trace, i) => ({ ...trace, visible: !off.has(i) }));
    const layout = resolve(merge(data.base, figure.layout));
    layout.font = { ...layout.font, family: getComputedStyle(document.body).fontFamily };
    layout.showlegend = false;
    layout.dragmode = touch ? false : "zoom";
    layout.height = figure.height;
    if (width) layout.width = width;
    else layout.autosize = true;
    const config = {
      responsive: !width, displaylogo: false, displayModeBar: touch ? false : "hover", scrollZoom: false,
      modeBarButtons: [["toImage", "resetScale2d"]],
      toImageButtonOptions: { filename: plot.dataset.figure, format: "svg" },
    };
    Plotly.react(plot, traces, layout, config);
    legend(plot, figure, off);
  }

  const MARKS = {
    circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", square: "M-3.6,-3.6h7.2v7.2h-7.2Z", diamond: "M0,-5L5,0L0,5L-5,0Z",
    "triangle-up": "M0,-4.6L4.6,3.4H-4.6Z", "triangle-down": "M0,4.6L4.6,-3.4H-4.6Z", "triangle-right": "M4.6,0L-3.4,4.6V-4.6Z", "triangle-left": "M-4.6,0L3.4,-4.6V4.6Z",
    star: "M0,-5.4L1.4,-1.7L5.3,-1.6L2.2,0.8L3.3,4.6L0,2.3L-3.3,4.6L-2.2,0.8L-5.3,-1.6L-1.4,-1.7Z",
    pentagon: "M0,-4.8L4.6,-1.5L2.8,3.9H-2.8L-4.6,-1.5Z", hexagon: "M0,-4.8L4.2,-2.4V2.4L0,4.8L-4.2,2.4V-2.4Z",
    cross: "M-1.5,-4.6H1.5V-1.5H4.6V1.5H1.5V4.6H-1.5V1.5H-4.6V-1.5H-1.5Z", "star-triangle-up": "M0,-5L5,4L0,2L-5,4Z",
    x: "M-3.4,-3.4L3.4,3.4M3.4,-3.4L-3.4,3.4", "star-diamond": "M0,-5.2L1.6,-1.6L5.2,0L1.6,1.6L0,5.2L-1.6,1.6L-5.2,0L-1.6,-1.6Z",
  };
  const DASHES = { solid: "", dash: "6 3", dot: "2 2.5", dashdot: "6 2.5 2 2.5", longdash: "9 3", longdashdot: "9 2.5 2 2.5" };
  function swatch(series) {
    const paint = colour(series.colour), bare = series.symbol.replace("-open", "");
    const open = bare !== series.symbol || bare === "x";
    const line = series.dash ? `<path d="M0,6H26" stroke="${paint}" stroke-width="2" stroke-dasharray="${DASHES[series.dash] || ""}"/>` : "";
    const fill = open ? (bare === series.symbol ? "none" : "var(--paper)") : paint;
    const mark = `<path transform="translate(13,6)" d="${MARKS[bare] || MARKS.circle}" fill="${fill}" stroke="${paint}" stroke-width="1.6"/>`;
    return `<svg width="26" height="12" viewBox="0 0 26 12" aria-hidden="true">${line}${mark}</svg>`;
  }
  function legend(plot, figure, off) {
    const list = plot.parentElement.querySelector(".legend");
    list.replaceChildren();
    if (figure.series.length < 2) return;
    for (const series of figure.series) {
      const entry = document.createElement("button");
      entry.type = "button";
      entry.innerHTML = swatch(series); // colours and marks of our own, no words
      entry.append(series.label);
      entry.setAttribute("aria-pressed", String(!series.traces.some((i) => off.has(i))));
      entry.addEventListener("click", () => {
        const now = hidden.get(plot) || new Set();
        const show = series.traces.some((i) => now.has(i));
        series.traces.forEach((i) => (show ? now.delete(i) : now.add(i)));
        hidden.set(plot, now);
        Plotly.restyle(plot, { visible: show }, series.traces);
        entry.setAttribute("aria-pressed", String(show));
      });
      const item = document.createElement("li");
      item.append(entry);
      list.append(item);
    }
  }
  const plots = [...document.querySelectorAll(".plot")];
  const later = (work) => (window.requestIdleCallback ? requestIdleCallback(work, { timeout: 300 }) : setTimeout(work, 30));
  let turn = 0, waiting = new Set();
  function drawNow(plot) {
    if (!waiting.delete(plot)) return;
    draw(plot);
    if (!waiting.size) root.dataset.drawn = theme();
  }
  function drawAll() { // what is seen at once, the rest when there is time, so that the page can be read meanwhile
    const mine = ++turn;
    waiting = new Set(plots);
    delete root.dataset.drawn;
    if (!plots.length) root.dataset.drawn = theme();
    plots.filter(isNear).forEach(drawNow);
    const next = () => {
      if (mine !== turn || !waiting.size) return;
      drawNow(waiting.values().next().value);
      later(next);
    };
    later(next);
  }
  function isNear(plot) {
    const box = plot.getBoundingClientRect();
    return box.bottom > -200 && box.top < innerHeight + 200;
  }
  addEventListener("scroll", () => [...waiting].filter(isNear).forEach(drawNow), { passive: true });
  addEventListener("beforeprint", () => {
    printing = true;
    ++turn;
    for (const plot of plots) {
      const block = plot.closest(".gallery").classList;
      draw(plot, block.contains("small") ? 160 : block.contains("single") ? 640 : 325);
    }
  });
  addEventListener("afterprint", () => {
    printing = false;
    drawAll();
  });

  // -- tables -------------------------------------------------------------------------------------
  const keyOf = (row, at) => {
    const cell = row.cells[at];
    return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, at) =>
      head.querySelector("button").addEventListener("click", () => {
        const numeric = head.classList.contains("num");
        const before = head.getAttribute("aria-sort");
        const down = before === "none" ? numeric : before === "ascending"; // numbers: largest first
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, at), row]);
        const empty = ([key]) => key === "" || (numeric && typeof key !== "number");
        const filled = rows.filter((row) => !empty(row)).sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]));
        table.tBodies[0].append(...filled.map(([, row]) => row), ...rows.filter(empty).map(([, row]) => row));
      }),
    );
  }

  // -- where we are -------------------------------------------------------------------------------
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
      const first = [...links.keys()].find((name) => seen.has(name));
      links.forEach((link, name) => (name === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
    }, { rootMargin: "-10% 0px -60% 0px" });
    document.querySelectorAll("main section").forEach((section) => watch.observe(section));
  }
  showTheme();
})();
