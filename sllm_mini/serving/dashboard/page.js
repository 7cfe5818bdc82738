// Asks /admin/ps, draws what it says, and keeps the last two minutes of it. What comes is text, and is never read as HTML.
"use strict";

const RUNGS = ["process", "runtime", "dram", "device", "ready"];
const DARK = ["cold", "process", "runtime"]; // white text reads better on these
const KEPT_SECONDS = 120, LEAST_SECONDS = 20, ASK_MILLISECONDS = 500, MOST_ROWS = 64, MOST_MODELS = 200;
const SVG = "http://www.w3.org/2000/svg";
const rows = new Map(); // by instance: {node, instance, spans: [{from, to, model, warmth, climbing, busy}]}
const at = (id) => document.getElementById(id);

function make(tag, given = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

function draw(tag, given = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
}

function seconds(count) {
  return count >= 120 ? `${Math.round(count / 60)} min` : `${Math.round(count)} s`;
}

// What was seen

function remember(status, now) {
  for (const each of status.instances) {
    if (!rows.has(each.instance)) rows.set(each.instance, { node: each.node, instance: each.instance, spans: [] });
    const spans = rows.get(each.instance).spans, last = spans.at(-1);
    const seen = { model: each.model ?? "", warmth: each.warmth, climbing: each.climbing_to ?? "", busy: each.requests > 0 };
    const same = last && last.open && Object.keys(seen).every((name) => last[name] === seen[name]);
    if (last) { last.to = last.open ? now : last.to; last.open = same; }
    if (!same) spans.push({ from: now, to: now, open: true, ...seen });
  }
  const there = new Set(status.instances.map((each) => each.instance));
  for (const [instance, row] of rows) {
    if (!there.has(instance)) row.spans.at(-1).open = false;
    while (row.spans.length && row.spans[0].to < now - KEPT_SECONDS) row.spans.shift();
    if (!row.spans.length) rows.delete(instance);
  }
  while (rows.size > MOST_ROWS) rows.delete(rows.keys().next().value);
}

// The timeline

function words(span) {
  const what = span.climbing ? `climbs from ${span.warmth} to ${span.climbing}` : span.busy ? "serves" : `idle, ${span.warmth}`;
  return `${span.model || "no model"}: ${what}`;
}

function pattern(rung) {
  const made = draw("pattern", { id: `to-${rung}`, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  made.append(draw("rect", { width: 6, height: 6, class: rung }), draw("line", { x1: 0, y1: 0, x2: 0, y2: 6, class: "hatch" }));
  return made;
}

function timeline(now) {
  const canvas = at("timeline"), width = canvas.clientWidth || 800, height = 26, left = Math.min(150, width / 4), right = 10;
  const shown = [...rows.values()], whole = shown.length * height + 30;
  const first = Math.min(...shown.map((row) => row.spans[0].from)), step = [5, 10, 20, 30].find((each) => now - first <= 4 * each) ?? 30;
  const kept = Math.min(KEPT_SECONDS, Math.max(LEAST_SECONDS, 4 * step)); // more once there is more
  const x = (time) => left + (width - left - right) * Math.max(0, 1 - (now - time) / kept);
  canvas.toggleAttribute("hidden", !shown.length);
  at("none").hidden = shown.length > 0;
  canvas.setAttribute("viewBox", `0 0 ${width} ${whole}`);
  canvas.setAttribute("height", whole);
  const parts = [draw("defs")];
  parts[0].append(...RUNGS.map(pattern));
  for (let ago = 0; ago <= kept; ago += width < 600 ? 2 * step : step) {
    parts.push(draw("line", { x1: x(now - ago), x2: x(now - ago), y1: 4, y2: whole - 20, class: "grid" }));
    const anchor = ago === 0 ? "end" : ago === kept ? "start" : "middle";
    parts.push(draw("text", { x: x(now - ago), y: whole - 6, "text-anchor": anchor, class: "tick" }, ago ? `${ago} s ago` : "now"));
  }
  shown.forEach((row, number) => {
    const y = 6 + number * height;
    parts.push(draw("text", { x: 8, y: y + 14 }, `${row.node} #${row.instance}`.slice(0, Math.floor(left / 7))));
    for (const span of row.spans) {
      const from = x(span.from), long = Math.max(1.5, x(span.to) - from), rung = span.climbing || span.warmth;
      const tall = span.busy || span.climbing ? 18 : 8, top = y + (18 - tall) / 2;
      const bar = draw("rect", { x: from, y: top, width: long, height: tall, class: span.climbing ? "bar" : `bar ${rung}` });
      if (span.climbing) bar.setAttribute("fill", `url(#to-${rung})`);
      bar.append(draw("title", {}, words(span)));
      parts.push(bar);
      if (tall === 18 && !span.climbing && long > 7 * span.model.length + 8) {
        parts.push(draw("text", { x: from + 4, y: y + 13, class: DARK.includes(rung) ? "on-dark" : "on-light" }, span.model));
      }
    }
  });
  canvas.replaceChildren(...parts);
  canvas.setAttribute("aria-label", shown.map((row) => `${row.node}, instance ${row.instance}: ${words(row.spans.at(-1))}`).join("; ") || "no instance");
}

function legend() {
  const one = (given, text) => {
    const picture = draw("svg", { viewBox: "0 0 16 12", "aria-hidden": "true" });
    picture.append(draw("rect", { width: 16, ...given }));
    return make("li", {}, picture, text);
  };
  at("legend").append(
    ...RUNGS.map((rung) => one({ height: 12, class: rung }, rung)),
    one({ height: 12, fill: "url(#to-ready)" }, "hatched: climbing there"), one({ height: 5, y: 4, class: "ready" }, "thin: idle"),
  );
}

// What is now

function chip(rung) {
  const picture = draw("svg", { class: "chip", "aria-hidden": "true" });
  picture.append(draw("rect", { class: rung }));
  return picture;
}

function tiles(counts) {
  const cold = Object.entries(counts.cold_starts).filter(([, count]) => count).map(([rung, count]) => `${count} from ${rung}`);
  const told = [
    ["running", counts.running], ["waiting", counts.waiting], ["answered", counts.answered], ["not answered", counts.failed + counts.turned_away],
    [`cold starts${cold.length ? `: ${cold.join(", ")}` : ""}`, Object.values(counts.cold_starts).reduce((sum, count) => sum + count, 0)], ["migrations", counts.migrations],
  ];
  at("requests").replaceChildren(...told.map(([name, count]) => make("div", {}, make("dt", {}, name), make("dd", {}, count.toLocaleString("en")))));
}

function models(status) {
  const kept = (each) => each.min_instances ? `${each.min_instances} always` : each.keep_alive === null ? "by policy" : each.keep_alive < 0 ? "for good" : seconds(each.keep_alive);
  const line = (each) => {
    const cached = Object.entries(each.cached).map(([node, tier]) => `${tier} of ${node}`).join(", ") || "their source only";
    const cells = [each.name, bytes(each.nbytes), "", `${each.instances}`, cached, kept(each)].map((text, number) => make(number ? "td" : "th", number ? {} : { scope: "row" }, text));
    cells[2].append(chip(each.state), each.state);
    cells[1].className = cells[3].className = "number";
    return make("tr", {}, ...cells);
  };
  const more = status.models.length - MOST_MODELS;
  at("models").replaceChildren(...status.models.slice(0, MOST_MODELS).map(line), ...(more > 0 ? [make("tr", {}, make("td", { colspan: 6 }, `and ${more} more`))] : []));
}

function measure(name, used, budget, kind) {
  const share = budget ? Math.min(1, used / budget) : 0;
  const picture = draw("svg", { role: "img", "aria-label": `${name}: ${bytes(used)} of ${bytes(budget)}`, viewBox: "0 0 100 10", preserveAspectRatio: "none" });
  picture.append(draw("rect", { width: 100 * share, height: 10, class: kind }));
  return make("div", { class: "measure" }, make("span", {}, name), picture, make("span", { class: "figure" }, `${bytes(used)} of ${bytes(budget)}`));
}

function nodes(status) {
  const card = (node) => {
    const here = status.instances.filter((each) => each.node === node.name);
    const busy = here.filter((each) => each.warmth === "device" || each.warmth === "ready" || each.climbing_to === "device" || each.climbing_to === "ready").length;
    const made = make("article", {}, make("h3", {}, node.name));
    if (!node.alive) {
      const back = node.returns_in_seconds === null ? "" : node.returns_in_seconds > 0 ? `; it is started again in ${seconds(node.returns_in_seconds)}` : "; it is coming up";
      made.append(make("p", { class: "bad" }, `lost: ${node.reason}${back}`));
      return made;
    }
    made.append(make("p", {}, `${busy} of ${node.devices} ${node.devices === 1 ? "device" : "devices"} taken, ${here.length} ${here.length === 1 ? "instance" : "instances"}`));
    if (node.store) {
      made.append(measure("DRAM", node.store.dram_used_nbytes, node.store.dram_budget_nbytes, "dram"));
      if (node.store.disk_budget_nbytes) made.append(measure("disk", node.store.disk_used_nbytes, node.store.disk_budget_nbytes, "disk"));
      if (node.store.shared_nbytes) made.append(make("p", {}, `${bytes(node.store.shared_nbytes)} kept running for all its workers`));
    }
    return made;
  };
  at("nodes").replaceChildren(...status.nodes.map(card));
}

// Asking

function tell(text, lost = false) {
  if (at("link").textContent !== text) at("link").textContent = text; // else screen readers would say it each time
  at("link").classList.toggle("lost", lost);
}

async function ask() {
  const key = sessionStorage.getItem("key"), headers = key ? { authorization: `Bearer ${key}` } : {};
  try {
    const answer = await fetch("admin/ps", { headers, cache: "no-store" });
    if (answer.status === 401) {
      at("ask").hidden = false;
      at("shown").hidden = true;
      return tell(key ? "that key is not one of this server's" : "this server wants a key");
    }
    if (!answer.ok) throw new Error(`it answers ${answer.status}`);
    const status = await answer.json(), now = performance.now() / 1000;
    at("ask").hidden = true;
    at("shown").hidden = false;
    remember(status, now);
    tiles(status.requests);
    timeline(now);
    models(status);
    nodes(status);
    tell("connected");
  } catch (error) {
    tell(`the server cannot be asked: ${error.message}`, true);
  }
  setTimeout(ask, document.hidden ? 4 * ASK_MILLISECONDS : ASK_MILLISECONDS);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  at("key").value = "";
  ask();
});
legend();
ask();
