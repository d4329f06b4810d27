// The adapter's page: it reads the state and listens to events, and changes nothing. All texts are set as text.

const $ = (id) => document.getElementById(id);

const make = (tag, properties = {}, ...children) => {
  const e = document.createElement(tag);
  const { tone, ...rest } = properties;
  Object.assign(e, rest);
  if (tone) e.dataset.tone = tone;
  e.append(...children.filter((c) => c !== null));
  return e;
};

const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;
const short = (digest) => digest.slice(0, 12);

// ---- State

const tones = { "as applied": "good", "drifted": "bad", "rolling out": "warn", "waits for a proxy": "info", "no filters": "info",
  "held": "bad", "cannot be planned": "bad", "not verified": "warn" };
const proxyTones = { running: "good", rejected: "bad", waiting: "warn", held: "info", gone: "info", apart: "info" };

const shown = new Map(); // target -> { text, element }

function chain(t) {
  if (t.filters.length === 0) return make("p", { className: "hint", textContent: "Requests meet no filter." });
  return make("ol", { className: "chain" }, ...t.filters.map((f) => make("li", {},
    make("span", { className: "name", textContent: f.name }),
    make("span", { className: "about" },
      [f.source, f.phase, f.priority ? `priority ${f.priority}` : "", `on failure ${f.failurePolicy}`].filter(Boolean).join(" · ")),
    make("span", { className: "about" }, "sha256 ", make("code", { title: f.sha256, textContent: `${short(f.sha256)}…` })))));
}

function proxies(t) {
  if (t.proxies.length === 0) return null;
  const detailed = t.proxies.some((p) => p.detail);
  const head = ["Proxy", "Envoy", t.offered ? "Offered version" : "Chain", ...(detailed ? ["What it says"] : [])];
  const table = make("table", {},
    make("caption", { textContent: Object.entries(t.counts).map(([state, n]) => `${count(n, "proxy", "proxies")} ${state}`).join(", ") }),
    make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col", textContent: h })))),
    make("tbody", {}, ...t.proxies.map((p) => make("tr", {},
      make("th", { scope: "row", textContent: p.id }),
      make("td", { textContent: p.version || "unknown" }),
      make("td", {}, make("span", { className: "chip", tone: proxyTones[p.state] ?? "info", textContent: p.state })),
      detailed ? make("td", { textContent: p.detail ?? "" }) : null))));
  return make("div", {}, table, t.moreProxies
    ? make("p", { className: "hint", textContent: `and ${count(t.moreProxies, "proxy", "proxies")} more` }) : null);
}

function target(t, id) {
  const tone = tones[t.condition] ?? "info";
  const title = make("h3", { id, textContent: t.target });
  const e = make("article", { className: "target", tone },
    make("div", { className: "head" }, title, make("span", { className: "chip", tone, textContent: t.condition }),
      t.version ? make("span", { className: "mono", textContent: `${t.mesh} · version ${t.version}` }) : null),
    t.problem ? make("p", { className: "trouble", textContent: t.problem }) : null,
    t.offered ? make("p", { className: "offer", textContent: `A change is under way: version ${t.offered} is offered. The chain below is the one before it.` }) : null,
    t.filters.length ? make("h4", { textContent: "Requests meet, in this order" }) : null,
    chain(t), proxies(t));
  e.setAttribute("aria-labelledby", id);
  return e;
}

// draw replaces only what has changed, so that reading and selecting are not disturbed.
function draw(state) {
  $("version").textContent = state.version;
  $("problem").hidden = !state.problem;
  if ($("problem").textContent !== (state.problem ?? "")) $("problem").textContent = state.problem ?? "";
  const n = state.targets.length + state.moreTargets;
  const summary = n === 0 ? "No targets" : [count(n, "target", "targets"), count(state.proxies, "proxy", "proxies"),
    state.drifted ? `${state.drifted} drifted` : "none drifted"].join(", ");
  if ($("summary").textContent !== summary) $("summary").textContent = summary;
  document.title = `${state.drifted ? `(${state.drifted}) ` : ""}meshery-filters`;
  $("none").hidden = n > 0;
  $("more").hidden = state.moreTargets === 0;
  $("more").textContent = `and ${count(state.moreTargets, "target", "targets")} more: meshery-filters status lists all`;
  const list = $("targets");
  const present = new Set();
  let place = list.firstElementChild;
  state.targets.forEach((t) => {
    const key = `${t.mesh} ${t.target}`;
    present.add(key);
    const text = JSON.stringify(t);
    let known = shown.get(key);
    if (known?.text !== text) {
      const element = target(t, known?.element.getAttribute("aria-labelledby") ?? `target-${serial++}`);
      if (known) {
        if (place === known.element) place = element;
        known.element.replaceWith(element);
      }
      known = { text, element };
      shown.set(key, known);
    }
    if (known.element === place) place = place.nextElementSibling;
    else list.insertBefore(known.element, place);
  });
  for (const [key, { element }] of shown) {
    if (!present.has(key)) {
      element.remove();
      shown.delete(key);
    }
  }
}
let serial = 0;

let tag = "";
let busy = false; // a request is under way
let again = false; // something happened meanwhile
let timer = 0;
let moving = false; // a change is under way, so the next look comes sooner

async function look() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  clearTimeout(timer);
  try {
    const response = await fetch("api/state", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {}, signal: AbortSignal.timeout(15_000) });
    if (response.status === 200) {
      const state = await response.json();
      tag = response.headers.get("ETag") ?? "";
      moving = state.targets.some((t) => t.condition === "rolling out");
      draw(state);
    } else if (response.status !== 304) {
      throw new Error(await response.text());
    }
    stale("");
  } catch (err) {
    stale(err.name === "TypeError" || err.name === "TimeoutError" ? "The adapter does not answer; what is shown may be out of date." : err.message);
  } finally {
    busy = false;
    timer = setTimeout(look, again ? 300 : moving ? 700 : 2000);
    again = false;
  }
}

function stale(text) {
  $("stale").hidden = !text;
  if ($("stale").textContent !== text) $("stale").textContent = text;
}

// ---- Events

const mostEvents = 200;
const told = new Set(); // operation and sequence of the events in the list, since a stream may repeat some
const held = []; // those that came while paused
let live = false; // the past was sent, so what comes now is new
let last = ""; // position of the last event
const eventTones = ["info", "warn", "bad"];

function row(e) {
  const tone = eventTones[e.event_type] ?? "info";
  const time = new Date(e.time);
  const lines = [e.details, e.probable_cause && `Probable cause: ${e.probable_cause}`,
    e.suggested_remediation && `What to do: ${e.suggested_remediation}`].filter(Boolean);
  const kind = { warn: "Warning", bad: "Error" }[tone];
  return make("li", { tone, className: live ? "new" : "" },
    make("span", { className: "said" }, kind ? make("b", { textContent: `${kind}: ` }) : null, e.summary),
    make("span", { className: "meta" }, make("time", { dateTime: e.time, textContent: time.toLocaleTimeString([], { hour12: false }) }),
      ` · ${short(e.operation_id)} #${e.sequence}${e.last ? " · last" : ""}${e.error_code ? ` · ${e.error_code}` : ""}`),
    lines.length ? make("details", {}, make("summary", { textContent: "Details" }), ...lines.map((l) => make("p", { textContent: l }))) : null);
}

function show(e) {
  const list = $("events");
  const at = list.scrollTop;
  const item = row(e);
  item.dataset.key = `${e.operation_id}#${e.sequence}`;
  list.prepend(item);
  // Who has scrolled down reads; what is read stays where it is.
  if (at > 0) list.scrollTop = at + item.offsetHeight;
  while (list.childElementCount > mostEvents) {
    told.delete(list.lastElementChild.dataset.key);
    list.lastElementChild.remove();
  }
  $("no-events").hidden = true;
  if (live && (e.last || e.event_type > 0)) $("announce").textContent = e.summary;
}

function hear(e) {
  const key = `${e.operation_id}#${e.sequence}`;
  if (told.has(key)) return;
  told.add(key);
  if (live) look();
  if ($("pause").getAttribute("aria-pressed") === "true") {
    held.push(e);
    if (held.length > mostEvents) held.shift();
    $("paused").textContent = `${count(held.length, "event has", "events have")} happened meanwhile.`;
    $("paused").hidden = false;
    return;
  }
  show(e);
}

function link(state, text) {
  $("link").dataset.state = state;
  if ($("link").textContent !== text) $("link").textContent = text;
}

function listen() {
  const source = new EventSource(`api/events${last ? `?after=${encodeURIComponent(last)}` : ""}`);
  source.addEventListener("message", (m) => {
    last = m.lastEventId;
    hear(JSON.parse(m.data));
  });
  source.addEventListener("now", () => {
    live = true;
    link("live", "Live");
    look();
  });
  source.addEventListener("missed", () => hear({ operation_id: "page", sequence: ++serial, event_type: 1, time: new Date().toISOString(),
    summary: "Some events came too fast for this page and are not shown." }));
  source.addEventListener("error", () => {
    live = false;
    // The browser tries again by itself after a broken connection, and not after a refusal.
    if (source.readyState === EventSource.CLOSED) {
      link("connecting", "No events: the adapter refuses a further listener for now");
      setTimeout(listen, 5000);
    } else {
      link("connecting", "Connecting…");
    }
  });
}

$("pause").addEventListener("click", () => {
  const paused = $("pause").getAttribute("aria-pressed") !== "true";
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) return;
  $("paused").hidden = true;
  for (const e of held.splice(0)) show(e);
});

$("only").addEventListener("change", () => $("events").classList.toggle("only", $("only").checked));

look();
listen();
