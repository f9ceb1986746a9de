// Asks the listener once a second while the page is seen, and shows the answer. Whatever comes in is set as text, never as markup.
"use strict";

const token = document.querySelector("meta[name=token]").content;
const margins = new Map(); // number of the hop → above the threshold, of the last minute
const KEPT = 750, LOW = -4, HIGH = 4;
let failures = 0, shown = "";

const at = (id) => document.getElementById(id);
const text = (id, value) => { if (at(id).textContent !== value) at(id).textContent = value; };
const number = (value, digits = 0) => value === null || value === undefined ? "–" : value.toLocaleString(undefined, { maximumFractionDigits: digits });

function element(name, attributes = {}, content = "") {
  const made = name === "svg" || name === "polyline" || name === "line" ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = content;
  return made;
}

function span(seconds) {
  if (seconds < 90) return `${number(seconds)} s`;
  if (seconds < 5400) return `${number(seconds / 60)} min`;
  return seconds < 172800 ? `${number(seconds / 3600, 1)} h` : `${number(seconds / 86400, 1)} days`;
}

function when(time) {
  const date = new Date(1000 * time);
  const clock = date.toLocaleTimeString();
  return date.toDateString() === new Date().toDateString() ? clock : `${date.toLocaleDateString()} ${clock}`;
}

function verdict(kind, state, detail) {
  at("verdict").className = `verdict v-${kind}`;
  at("state").className = kind;
  text("state", state);
  text("detail", detail);
}

function show(now) {
  const deaf = now.events.find((one) => one.kind === "deaf");
  if (!now.listening) verdict("bad", "Deaf", deaf ? `${when(deaf.time_s)} ${deaf.words}` : "edgekws doctor says what is missing");
  else if (now.level_dbfs === null) verdict("warn", "Listening, to digital silence", "Is the microphone muted?");
  else if (now.dropped || now.clips_dropped) verdict("warn", "Listening, and something is too slow", "Events or clips were dropped: journalctl -u edgekws");
  else verdict("ok", "Listening", now.gaps ? `with ${now.gaps} gaps since the start` : "no audio was lost since the start");
  document.title = `${at("state").textContent} – edgekws`;
  text("source", now.source);
  text("level", now.level_dbfs === null ? (now.listening ? "silence" : "–") : `${number(now.level_dbfs)} dBFS`);
  at("meter").value = now.level_dbfs ?? -72;
  text("wakes", number(now.wakes));
  text("last", now.last_wake ? `last: ${now.last_wake.keyword}${now.last_wake.speaker ? ` (${now.last_wake.speaker})` : ""}, ${when(now.last_wake.time_s)}` : "none yet");
  text("lost", `${number(now.lost_s, 2)} s`);
  text("gaps", `${number(now.gaps)} gaps`);
  text("dropped", number(now.dropped + now.clips_dropped));
  text("dropped-by", Object.entries({ ...now.dropped_by, clips: now.clips_dropped }).filter(([, count]) => count).map(([name, count]) => `${name} ${count}`).join(", ") || "none");
  text("model", now.model);
  text("engine", now.engine);
  text("hop", now.hops ? `${number(1000 * now.busy_s / now.hops, 2)} ms for each 80 ms` : "");
  text("heard", span(now.audio_s));
  text("power", now.power.mw === null ? (now.power.by ? "…" : "not read") : `${number(now.power.mw / 1000, 2)} W`);
  text("meter-name", now.power.by || (now.power.why.length > 70 ? `${now.power.why.slice(0, 70)}…` : now.power.why));
  text("trouble", now.trouble ?? "");
  strip(now.margins);
  at("scores").replaceChildren(...now.scores.map((one) => {
    const row = element("tr");
    row.append(element("td", { class: "name" }, one.speaker ? `${one.keyword} (${one.speaker})` : one.keyword));
    row.append(element("td", { class: one.score !== null && one.score >= one.threshold ? "number wake" : "number" }, one.score === null ? "–" : one.score.toFixed(2)));
    row.append(element("td", { class: "number" }, one.threshold.toFixed(2)));
    return row;
  }));
  events(now.events);
}

function strip(news) {
  const last = news.length ? news[news.length - 1][0] : 0;
  if (last < Math.max(0, ...margins.keys())) margins.clear(); // another start
  for (const [hop, margin] of news) margins.set(hop, margin);
  for (const hop of margins.keys()) if (hop <= last - KEPT) margins.delete(hop);
  const y = (margin) => 160 * (HIGH - Math.min(HIGH, Math.max(LOW, margin))) / (HIGH - LOW);
  const parts = [];
  for (let one = LOW + 1; one < HIGH; one++) parts.push(element("line", { x1: 0, x2: KEPT, y1: y(one), y2: y(one), class: one ? "grid" : "threshold" }));
  let points = [], before = null;
  const end = () => { if (points.length) parts.push(element("polyline", { points: points.join(" "), class: "score" })); points = []; };
  for (const [hop, margin] of [...margins].sort((a, b) => a[0] - b[0])) {
    if (margin === null || (before !== null && hop !== before + 1)) end();
    if (margin !== null) points.push(`${KEPT - (last - hop)},${y(margin).toFixed(1)}`);
    before = hop;
  }
  end();
  at("strip").replaceChildren(...parts);
}

function events(list) {
  const now = JSON.stringify(list);
  if (now === shown) return; // else a button could not be pressed while it is replaced
  shown = now;
  at("events").replaceChildren(...list.map((one) => {
    const row = element("tr");
    const kinds = { wake: "wake", gap: "near", deaf: "bad" };
    row.append(element("td", { class: "time soft" }, when(one.time_s)));
    row.append(element("td", { class: one.wrong ? "wrong" : kinds[one.kind] ?? "soft" }, one.words + (one.wrong ? ", marked as wrong" : "")));
    const last = element("td", { class: "number" });
    if (one.kind === "wake" && token && !one.wrong) {
      const button = element("button", { type: "button" }, "was wrong");
      button.setAttribute("aria-label", `this wake was wrong: ${one.words}`);
      button.addEventListener("click", () => reject(one.id, button));
      last.append(button);
    }
    row.append(last);
    return row;
  }));
  if (!list.length) at("events").append(element("tr", {}, "nothing yet"));
}

async function reject(event, button) {
  button.disabled = true;
  try {
    const answer = await fetch("/wrong", { method: "POST", headers: { "Content-Type": "application/json", "X-Edgekws-Token": token }, body: JSON.stringify({ event }) });
    if (!answer.ok) throw new Error(await answer.text());
    await ask();
  } catch (error) {
    button.disabled = false;
    text("trouble", `not marked: ${error.message}`);
  }
}

async function ask() {
  try {
    const answer = await fetch("/state", { signal: AbortSignal.timeout(4000) });
    if (!answer.ok) throw new Error(await answer.text());
    show(await answer.json());
    failures = 0;
  } catch (error) {
    if (++failures >= 3) verdict("bad", "The listener does not answer", `${error.message}. systemctl status edgekws`);
  }
}

async function loop() {
  if (!document.hidden) await ask();
  setTimeout(loop, 1000);
}
loop();
