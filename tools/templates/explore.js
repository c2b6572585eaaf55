"use strict";
// A line: slot, concept or null, share of rows, mean where active, largest, AUROC or null, false share, missed share,
// token of the first context, first promoted token, part of the details. lines[s] is that of slot s.
const SLOT = 0, NAME = 1, PEAK = 8, TOKEN = 9, PART = 10, SHOWN = 100;
const body = document.body, byId = id => document.getElementById(id);
const lines = [], details = new Map(), waiting = new Map();
let chosen = [], page = 0, column = 0, descending = false, loaded = 0;

const alignsae = {
  lines(part, items) { for (const item of items) lines.push(item); loaded += 1; },
  details(part, items) { for (const item of items) details.set(item.i, item); },
};

function load(name, part) {
  const file = `data/${name}-${String(part).padStart(5, "0")}.js`;
  if (!waiting.has(file)) waiting.set(file, new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = file;
    script.async = name !== "lines"; // lines run in their order, however they arrive
    script.onload = done;
    script.onerror = () => failed(new Error(`${file} cannot be read`));
    document.head.append(script);
  }));
  return waiting.get(file);
}

function make(tag, text, options = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") element.className = value; else element.setAttribute(key, value);
  }
  return element;
}

const number = (value, digits = 3) => value === null ? "" : value.toPrecision(digits);
const share = value => value === null ? "" : value === 0 ? "0" : `${(100 * value).toPrecision(3)}%`;

function choose() {
  const query = byId("query").value.trim().toLowerCase(), kind = byId("kind").value;
  chosen = lines.filter(line => {
    if (kind === "concept" && line[NAME] === null || kind === "free" && line[NAME] !== null) return false;
    if (kind === "dead" && line[2] > 0) return false;
    return !query || String(line[SLOT]) === query
      || [line[NAME], line[PEAK], line[TOKEN]].some(text => text && text.toLowerCase().includes(query));
  });
  const sign = descending ? -1 : 1;
  if (column !== SLOT || descending) chosen.sort((a, b) => {
    const x = a[column], y = b[column];
    if (x === y) return a[SLOT] - b[SLOT];
    if (x === null || x === "") return 1;
    if (y === null || y === "") return -1;
    return sign * (x < y ? -1 : 1);
  });
  page = Math.max(0, Math.min(page, Math.ceil(chosen.length / SHOWN) - 1));
  show();
}

function show() {
  const rows = chosen.slice(page * SHOWN, (page + 1) * SHOWN).map(line => {
    const row = make("tr"), first = make("td");
    first.append(make("a", line[SLOT], { href: `#${line[SLOT]}` }));
    const text = (value, kind) => make("td", value ?? "", { class: kind, title: value ?? "" });
    row.append(first, text(line[NAME], "text"), make("td", share(line[2])),
      ...[3, 4, 5].map(place => make("td", number(line[place]))),
      ...[6, 7].map(place => make("td", share(line[place]))),
      text(line[PEAK], "text token"), text(line[TOKEN], "text token"));
    return row;
  });
  byId("lines").replaceChildren(...rows);
  const pages = Math.max(1, Math.ceil(chosen.length / SHOWN));
  byId("page").textContent = `page ${page + 1} of ${pages}`;
  const more = loaded < Number(body.dataset.parts) ? ", still loading" : "";
  const [few, all] = [chosen, lines].map(list => list.length.toLocaleString("en"));
  byId("found").textContent = `${few} of ${all} slots${more}`;
  byId("before").disabled = page === 0;
  byId("after").disabled = page >= pages - 1;
  for (const button of document.querySelectorAll("th button")) {
    const own = Number(button.dataset.column) === column, head = button.parentElement;
    if (own) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function context(item, off) {
  const box = make("div", null, { class: off ? "context off" : "context" });
  const where = item.d === undefined ? `row ${item.r}` : `row ${item.r}, document ${item.d}, position ${item.p}`;
  const labels = item.l ? `, ${item.l.join(", ")}` : "";
  const what = make("div", null, { class: "what" });
  what.append(make("b", item.v ? item.v.toFixed(3) : "silent"), ` ${where}${labels}`);
  box.append(what);
  if (item.t) {
    const text = make("div", null, { class: "tokens" });
    item.t.forEach((token, place) => {
      const span = make("span", token, { class: place === item.f ? "here" : "" });
      const level = Number(item.a[place]);
      if (level) span.style.backgroundColor = `rgba(var(--mark), ${(0.08 + 0.07 * level).toFixed(2)})`;
      text.append(span);
    });
    box.append(text);
  }
  return box;
}

function group(title, note, nodes) {
  return nodes.length ? [make("h3", title), make("p", note, { class: "note" }), ...nodes] : [];
}

function histogram(counts) {
  const bars = make("div", null, { class: "bars", role: "img" }), most = Math.max(...counts);
  counts.forEach((count, bin) => {
    const low = 2 ** (bin / 2 - 8), range = [low, low * Math.SQRT2].map(edge => edge.toPrecision(2)).join(" to ");
    const bar = make("div", null, { title: `${range}: ${count} rows` });
    bar.style.height = `${most ? 100 * Math.log1p(count) / Math.log1p(most) : 0}%`;
    bars.append(bar);
  });
  bars.setAttribute("aria-label", `rows by activation: ${counts.join(", ")}`);
  return bars;
}

function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) list.append(make("dt", name), make("dd", value));
  return list;
}

function chips(items, label) {
  const box = make("div", null, { class: "chips" });
  for (const item of items) box.append(label(item));
  return box;
}

function way(slot) {
  const nav = make("nav", null, { class: "way", "aria-label": "Slots" });
  nav.append(make("a", "All slots", { href: "#" }));
  for (const [name, other] of [["Previous", slot - 1], ["Next", slot + 1]]) {
    if (lines[other]) nav.append(make("a", name, { href: `#${other}` }));
  }
  return nav;
}

function figures(line, item) {
  const known = [["active on", `${share(line[2])} of ${body.dataset.rows} rows`],
    ["mean where active", number(line[3])], ["largest", number(line[4])]];
  if (line[5] !== null) known.push(["AUROC", number(line[5], 4)]);
  if (item.k) known.push(["false firings", `${item.k.f} of ${item.k.n} rows without the concept (${share(line[6])})`],
    ["misses", `${item.k.m} of ${item.k.p} rows with it (${share(line[7])})`]);
  return facts(known.filter(([, value]) => value !== ""));
}

function neighbour([other, cosine]) {
  const found = lines[other], name = found && found[NAME] !== null ? ` ${found[NAME]}` : "";
  return make("a", `${other}${name} ${cosine.toFixed(3)}`, { href: `#${other}` });
}

async function open(slot) {
  const line = lines[slot], box = byId("slot");
  if (!line) return;
  try { await load("details", line[PART]); } catch (error) { box.textContent = error.message; return; }
  if (location.hash !== `#${slot}`) return;
  const item = details.get(slot), columns = make("div", null, { class: "columns" });
  const left = make("div"), right = make("div");
  const tokens = list => list ? [chips(list, ([text, value]) => make("span", text, { title: value.toFixed(3) }))] : [];
  const contexts = (list, off) => (list || []).map(found => context(found, off));
  left.append(figures(line, item),
    ...group("Activations", "rows by activation, in half octaves from 2^-8; heights are logarithms of counts",
      item.h ? [histogram(item.h)] : []),
    ...group("Promotes", "tokens whose logits the decoder row raises most", tokens(item.u)),
    ...group("Suppresses", "tokens whose logits it lowers most", tokens(item.s)),
    ...group("Nearest slots", "by the cosine of decoder rows",
      item.n && item.n.length ? [chips(item.n, neighbour)] : []));
  right.append(
    ...group("Contexts", "rows with the largest activations; shades show the slot on the tokens around",
      contexts(item.c, false)),
    ...group("False firings", "rows without the concept on which the slot is most active", contexts(item.w, true)),
    ...group("Misses", "rows with the concept on which the slot is silent", contexts(item.m, true)));
  if (!right.childNodes.length) right.append(make("p", "No row activates it.", { class: "note" }));
  columns.append(left, right);
  const title = line[NAME] === null ? `Slot ${slot}` : `Slot ${slot}: ${line[NAME]}`;
  box.replaceChildren(way(slot), make("h2", title), columns);
  byId("list").hidden = true;
  box.hidden = false;
  box.focus();
  window.scrollTo(0, 0);
}

function route() {
  const slot = location.hash.length > 1 ? Number(location.hash.slice(1)) : NaN;
  if (Number.isInteger(slot)) { open(slot); return; }
  byId("slot").hidden = true;
  byId("list").hidden = false;
}

byId("search").addEventListener("submit", event => event.preventDefault());
byId("query").addEventListener("input", () => { page = 0; choose(); });
byId("kind").addEventListener("change", () => { page = 0; choose(); });
byId("before").addEventListener("click", () => { page -= 1; show(); });
byId("after").addEventListener("click", () => { page += 1; show(); });
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const wanted = Number(button.dataset.column);
  descending = wanted === column ? !descending : wanted > NAME && wanted < PEAK;
  column = wanted;
  page = 0;
  choose();
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  const slot = Number(location.hash.slice(1));
  if (event.key === "Escape") { document.activeElement.blur(); location.hash = ""; }
  else if (typing) return;
  else if (event.key === "/") { event.preventDefault(); location.hash = ""; route(); byId("query").focus(); }
  else if ((event.key === "j" || event.key === "k") && location.hash.length > 1) {
    const other = slot + (event.key === "j" ? 1 : -1);
    if (lines[other]) location.hash = String(other);
  }
});
window.addEventListener("hashchange", route);

(async () => {
  try {
    const parts = Number(body.dataset.parts);
    await load("lines", 0);
    choose();
    route();
    await Promise.all(Array.from({ length: parts - 1 }, (_, part) => load("lines", part + 1)));
    if (parts > 1) choose();
    if (byId("slot").hidden) route();
  } catch (error) { byId("found").textContent = error.message; }
})();
