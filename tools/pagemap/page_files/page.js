"use strict";
// Names of files and programs are chosen by other users: text is only ever set as text.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, text, ...classes) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  made.classList.add(...classes);
  return made;
};
const size = bytes => {
  if (bytes === null) return "?";
  let unit = 0;
  while (bytes >= 1024 && unit < 5) { bytes /= 1024; unit++; }
  return `${Number(bytes.toFixed(1))} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
};
const percent = (part, whole) => {
  const share = whole ? part * 100 / whole : 0;
  return `${share >= 0.95 || !part ? Math.round(share) : share >= 0.05 ? share.toFixed(1) : 0} %`;
};
const sum = (numbers) => numbers.reduce((total, one) => total + one, 0);

// Areas with pages: name, start and end address (hexadecimal, as they exceed 53 bits), position and length.
const parts = data.parts.map(([name, start, end, position, length, mask]) =>
  ({ name: data.names[name], start, end, position, length, mask, last: position + length }));
const byStart = new Map(parts.map(part => [part.start, part]));
const full = { from: 0, to: data.length };
const view = { ...full, term: "", off: new Set(), sort: "resident_bytes", down: true, shown: 200 };
const states = data.states.map((state, index) => ({ ...state, index }));

// The state of the page is in its address: a link to `file.html#search=heap` opens it like this.
const readHash = () => {
  const given = new URLSearchParams(location.hash.slice(1));
  view.term = given.get("search") || "";
  view.from = Number(given.get("from")) || 0;
  view.to = Math.min(Number(given.get("to")) || data.length, data.length);
  if (!(view.from >= 0 && view.from < view.to)) Object.assign(view, full);
  view.off = new Set((given.get("hide") || "").split(",").filter(Boolean));
  if (given.get("theme")) document.documentElement.dataset.theme = given.get("theme");
  at("search").value = view.term;
};
const writeHash = () => {
  const kept = new URLSearchParams();
  if (view.term) kept.set("search", view.term);
  if (view.from > 0 || view.to < data.length) { kept.set("from", view.from); kept.set("to", view.to); }
  if (view.off.size) kept.set("hide", [...view.off].join(","));
  if (document.documentElement.dataset.theme) kept.set("theme", document.documentElement.dataset.theme);
  try { history.replaceState(null, "", `#${kept}`); } catch { /* some viewers of files forbid it */ }
};

const address = text => /^(0x)?[0-9a-f]{5,16}$/.test(text) ? BigInt(text.startsWith("0x") ? text : `0x${text}`) : null;
const matcher = () => {
  const term = view.term.trim().toLowerCase();
  if (!term) return null;
  const wanted = address(term);
  return (name, start, end) => name.toLowerCase().includes(term)
    || (wanted !== null && BigInt(`0x${start}`) <= wanted && wanted < BigInt(`0x${end}`));
};

const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

const HEIGHT = 470, LEFT = 70, STRIP = 46, GAP = 12, AXIS = 26;
const FIELD = data.physical_blocks ? HEIGHT - STRIP - GAP - AXIS : 0;
const scale = () => (at("picture").clientWidth - LEFT) / (view.to - view.from);
const place = position => (position - view.from) * scale();
const step = length => 2 ** Math.max(12, Math.floor(Math.log2(length / 5)));

const drawCanvas = () => {
  const canvas = at("picture"), width = canvas.clientWidth, dense = window.devicePixelRatio || 1;
  canvas.style.height = `${STRIP + AXIS + (FIELD ? FIELD + GAP : 0)}px`;
  canvas.width = width * dense;
  canvas.height = canvas.clientHeight * dense;
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  pen.translate(LEFT, 0);
  const plot = width - LEFT, colors = states.map(state => color(state.key));
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = color("ground");
  pen.fillRect(0, 0, plot, STRIP);
  if (FIELD) pen.fillRect(0, STRIP + GAP, plot, FIELD);
  pen.textAlign = "right";
  if (FIELD) {
    pen.save();
    pen.fillStyle = color("faint");
    pen.translate(-58, STRIP + GAP + FIELD / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText("physical address", 0, 0);
    pen.restore();
    const covered = data.physical_blocks * data.physical_block;
    for (let physical = 0; physical <= covered; physical += step(covered)) {
      const y = STRIP + GAP + FIELD * (1 - physical / covered);
      pen.fillStyle = color("line");
      pen.fillRect(0, y, plot, 1);
      pen.fillStyle = color("text");
      pen.fillText(physical ? size(physical) : "0", -6, y + 4);
    }
  }
  pen.save();
  pen.beginPath();
  pen.rect(0, 0, plot, HEIGHT);
  pen.clip();
  const edge = column => Math.round(place(Math.min(column * data.block, data.length)));
  data.columns.forEach(([, , ...sums], column) => {
    const x = edge(column), wide = edge(column + 1) - x;
    if (x > plot || x + wide < 0) return;
    const whole = Math.min(data.block, data.length - column * data.block);
    let y = 0;
    for (let index = 0; index < sums.length; index += 2) {
      const high = sums[index + 1] * STRIP / whole;
      if (!view.off.has(states[sums[index]].key)) {
        pen.fillStyle = colors[sums[index]];
        pen.fillRect(x, y, wide, high);
      }
      y += high;
    }
  });
  const high = FIELD / Math.max(1, data.physical_blocks);
  for (let index = 0; index < data.cells.length; index += 4) {
    const [column, row, state, degree] = data.cells.slice(index, index + 4);
    const x = edge(column), wide = edge(column + 1) - x;
    if (x > plot || x + wide < 0 || view.off.has(states[state].key)) continue;
    pen.globalAlpha = degree / data.degrees;
    pen.fillStyle = colors[state];
    pen.fillRect(x, STRIP + GAP + FIELD - (row + 1) * high, wide, high);
  }
  const matches = matcher();
  pen.globalAlpha = 0.8;
  pen.fillStyle = color("paper");
  for (const part of matches ? parts : [])
    if (!matches(part.name, part.start, part.end)) pen.fillRect(place(part.position), 0, part.length * scale(), HEIGHT);
  pen.globalAlpha = 1;
  pen.restore();
  const each = step(view.to - view.from);
  pen.textAlign = "center";
  for (let position = Math.ceil(view.from / each) * each; position <= view.to; position += each) {
    const x = place(position), foot = canvas.clientHeight - AXIS;
    pen.fillStyle = color("border");
    pen.fillRect(x, foot, 1, 5);
    pen.fillStyle = color("text");
    if (x < plot - 30) pen.fillText(position ? size(position) : "0", x, foot + 18);
  }
};

// The mappings in view: adjacent areas of one name are one box, boxes without room for a name share one.
const ROOM = 40;
const boxes = () => {
  const joined = [];
  for (const part of parts) {
    if (part.last <= view.from || part.position >= view.to) continue;
    const last = joined.at(-1);
    if (last && last.name === part.name) Object.assign(last, { last: part.last, end: part.end, areas: last.areas + 1 });
    else joined.push({ ...part, areas: 1 });
  }
  const found = [];
  for (const box of joined) {
    box.small = (Math.min(box.last, view.to) - Math.max(box.position, view.from)) * scale() < ROOM;
    const last = found.at(-1);
    if (box.small && last && last.small)
      Object.assign(last, { last: box.last, end: box.end, areas: last.areas + box.areas, name: `${last.name}, ${box.name}` });
    else found.push(box);
  }
  return found;
};
const drawBoxes = () => {
  const matches = matcher();
  at("boxes").replaceChildren(...boxes().map(box => {
    const x = Math.max(0, place(box.position)), end = Math.min(place(view.to), place(box.last));
    const made = make("button", box.small ? `${box.areas} small\n${size(box.last - box.position)}`
      : `${box.name}\n${size(box.last - box.position)}`);
    made.type = "button";
    made.classList.toggle("small", box.small);
    made.classList.toggle("other", Boolean(matches) && !parts.some(part =>
      part.position < box.last && part.last > box.position && matches(part.name, part.start, part.end)));
    made.style.left = `${x}px`;
    made.style.width = `${end - x}px`;
    if (end - x < 12) made.textContent = "";
    made.classList.toggle("narrow", end - x < 12);
    made.dataset.tip = `${box.name}\n0x${box.start}-0x${box.end}, ${box.areas} ${box.areas === 1 ? "area" : "areas"}\n`
      + `${size(box.last - box.position)} in pages`;
    made.addEventListener("click", () => zoom(box.position, box.last));
    return made;
  }));
  at("back").hidden = view.from === 0 && view.to === data.length;
};

const drawBars = () => {
  const largest = Math.max(1, ...data.groups.map(([, , sums]) => memory(sums)));
  at("bars").replaceChildren(...data.groups.map(([name, isGroup, sums]) => {
    const made = make("button", undefined, "bar"), span = make("span");
    made.type = "button";
    made.disabled = !isGroup;
    for (const state of states.filter(state => state.memory && sums[state.key])) {
      const part = make("i");
      part.style.background = `var(--${state.key})`;
      part.style.width = `calc(min(75%, 100% - 140px) * ${sums[state.key] / largest})`;  // its size is behind it
      span.append(part);
    }
    span.style.gap = "0";
    span.append(make("em", `${size(memory(sums))}, ${percent(memory(sums), data.memory)}`));
    made.append(make("b", name), span);
    made.dataset.tip = [name, ...states.filter(state => sums[state.key])
      .map(state => `${size(sums[state.key])} ${state.word}`)].join("\n");
    made.addEventListener("click", () => search(view.term === name ? "" : name));
    return made;
  }));
};
const memory = sums => sum(states.filter(state => state.memory).map(state => sums[state.key] || 0));

const drawLegend = () => at("legend").replaceChildren(...states.filter(state => state.total).map(state => {
  const made = make("button"), swatch = make("i");
  made.type = "button";
  made.dataset.state = state.key;
  made.setAttribute("aria-pressed", String(!view.off.has(state.key)));
  swatch.style.background = `var(--${state.key})`;
  made.append(swatch, state.words);
  made.addEventListener("click", () => {
    if (!view.off.delete(state.key)) view.off.add(state.key);
    draw();
  });
  return made;
}));

// The table: the areas that match the search, are in view, and have pages of a kind that is not hidden.
const column = Object.fromEntries(data.fields.map(([key], index) => [key, index]));
const isText = key => ["start", "perms", "name"].includes(key);
// Columns without a value in any area would make the table wider than the page.
const shown = data.fields.map(([key]) => key).filter(key =>
  key !== "end" && (isText(key) || data.rows.some(row => row[column[key]] !== 0)));
const selected = () => {
  const matches = matcher(), isPart = view.from > 0 || view.to < data.length;
  return data.rows.filter(row => {
    const start = row[column.start], part = byStart.get(start);
    if (matches && !matches(row[column.name], start, row[column.end])) return false;
    if (isPart && !(part && part.position < view.to && part.last > view.from)) return false;
    return !view.off.size || Boolean(part && states.some(state => !view.off.has(state.key) && part.mask >> state.index & 1));
  });
};
const drawTable = () => {
  const rows = selected(), headings = Object.fromEntries(data.fields);
  const sorted = column[view.sort], sign = view.down ? -1 : 1;
  // Hexadecimal numbers of different lengths are in order of their length.
  const longer = (one, other) => view.sort === "start" ? one[sorted].length - other[sorted].length : 0;
  rows.sort((one, other) => sign * longer(one, other)
    || sign * (one[sorted] < other[sorted] ? -1 : Number(one[sorted] > other[sorted])));
  at("head").replaceChildren(...shown.map(key => {
    const head = make("th"), button = make("button", headings[key]);
    button.type = "button";
    if (isText(key)) head.classList.add("text");
    if (view.sort === key) head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      Object.assign(view, { down: view.sort === key ? !view.down : !isText(key), sort: key });
      drawTable();
    });
    head.append(button);
    return head;
  }));
  const cell = (key, row) => {
    const value = row[column[key]];
    if (key === "start") return `${value}-${row[column.end]}`;
    return isText(key) ? value || "[anon]" : key.endsWith("_count") ? String(value ?? "?") : value ? size(value) : value === 0 ? "-" : "?";
  };
  at("rows").replaceChildren(...rows.slice(0, view.shown).map(row => {
    const made = make("tr"), part = byStart.get(row[column.start]);
    for (const key of shown) made.append(make("td", cell(key, row), ...(isText(key) ? ["text", key] : [])));
    if (part) {
      made.classList.add("drawn");
      made.addEventListener("click", () => { zoom(part.position, part.last); at("plot").scrollIntoView({ block: "center" }); });
    }
    return made;
  }));
  at("sums").replaceChildren(...shown.map(key => {
    const values = rows.map(row => row[column[key]]), summed = key.endsWith("_bytes") && !key.startsWith("largest");
    const text = key === "start" ? `${rows.length} of ${data.rows.length} areas`
      : summed ? values.includes(null) ? "?" : sum(values) ? size(sum(values)) : "-" : "";
    return make("td", text, ...(isText(key) ? ["text"] : []));
  }));
  at("more").hidden = rows.length <= view.shown;
  at("more").textContent = `Show all ${rows.length} areas`;
  const isAll = rows.length === data.rows.length;
  at("found").textContent = isAll ? "" : `${rows.length} of ${data.rows.length} areas selected, `
    + `${size(sum(rows.map(row => row[column.resident_bytes] || 0)))} resident`;
};

const draw = () => {
  at("theme").textContent = isDark() ? "Light" : "Dark";
  drawLegend();
  drawBoxes();
  drawCanvas();
  drawTable();
  writeHash();
};
const zoom = (from, to) => {
  if (to > from) Object.assign(view, { from, to });
  draw();
};
const search = term => {
  view.term = term;
  at("search").value = term;
  draw();
};

const under = event => {
  const box = at("picture").getBoundingClientRect();
  const x = event.clientX - box.left - LEFT, y = event.clientY - box.top;
  return x < 0 ? null : { x, y, position: Math.min(view.to, view.from + x / scale()) };
};
const tipOf = event => {
  if (event.target.closest("[data-tip]")) return event.target.closest("[data-tip]").dataset.tip;
  const point = event.target === at("picture") && under(event);
  if (!point) return "";
  const index = Math.min(data.columns.length - 1, Math.floor(point.position / data.block));
  const [start, end, ...sums] = data.columns[index];
  const part = parts.find(part => part.last > point.position);
  const lines = [`0x${start}-0x${end}`, part ? part.name : ""];
  for (let at = 0; at < sums.length; at += 2) lines.push(`${size(sums[at + 1])} ${states[sums[at]].word}`);
  const above = STRIP + GAP + FIELD - point.y;
  if (FIELD && above > 0 && above < FIELD) {
    const row = Math.floor(above / FIELD * data.physical_blocks) * data.physical_block;
    lines.push(`physical 0x${row.toString(16)}-0x${(row + data.physical_block).toString(16)}`);
  }
  return lines.join("\n");
};
document.addEventListener("mousemove", event => {
  const tip = at("tip"), text = tipOf(event);
  tip.style.display = text ? "block" : "none";
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
});

let drag = null;
at("picture").addEventListener("pointerdown", event => { drag = under(event); });
addEventListener("pointermove", event => {
  const point = drag && under(event);
  if (!point) return;
  at("selection").style.left = `${Math.min(point.x, drag.x)}px`;
  at("selection").style.width = `${Math.abs(point.x - drag.x)}px`;
});
addEventListener("pointerup", event => {
  const point = drag && under(event);
  if (point && Math.abs(point.x - drag.x) > 4)
    zoom(Math.floor(Math.min(point.position, drag.position)), Math.ceil(Math.max(point.position, drag.position)));
  drag = null;
  at("selection").style.width = "0";
});
at("picture").addEventListener("wheel", event => {
  const point = under(event);
  if (!point || !(event.ctrlKey || event.shiftKey)) return;
  event.preventDefault();
  const factor = (event.deltaY || event.deltaX) < 0 ? 0.7 : 1 / 0.7;
  const length = Math.min(data.length, Math.max(65536, (view.to - view.from) * factor));
  const share = (point.position - view.from) / (view.to - view.from);
  const from = Math.max(0, Math.min(data.length - length, point.position - length * share));
  zoom(Math.floor(from), Math.ceil(from + length));
}, { passive: false });

at("search").addEventListener("input", () => { view.term = at("search").value; draw(); });
at("back").addEventListener("click", () => zoom(0, data.length));
at("more").addEventListener("click", () => { view.shown = Infinity; drawTable(); });
at("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  draw();
});
addEventListener("keydown", event => {
  if (event.key === "Escape") { search(""); zoom(0, data.length); }
});
addEventListener("hashchange", () => { readHash(); draw(); });
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

at("extent").textContent = data.extent;
at("notes").replaceChildren(...data.notes.map(note => make("li", note)));
readHash();
drawBars();
draw();
