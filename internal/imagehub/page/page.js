// Image Hub's page. The token is a variable and nothing else, so it ends with the page. All texts are set as text.

const $ = (id) => document.getElementById(id);

let token = "";
let user = "";
let plan = "";
let pulling = false;
let ticking = 0; // the timer of the countdown

const mostLines = 50;
const patience = 20_000; // milliseconds for an answer

// call sends one request. It throws an Error with a text for people when nothing answers.
async function call(path, body) {
  const request = { method: body ? "POST" : "GET", headers: {}, cache: "no-store", credentials: "omit",
    redirect: "error", signal: AbortSignal.timeout(patience) };
  if (token) request.headers.Authorization = `Bearer ${token}`;
  if (body) {
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  try {
    const response = await fetch(path, request);
    return { response, text: await response.text() };
  } catch {
    throw new Error("Nothing answered. Is Image Hub, and the Envoy in front of it, still running?");
  }
}

// mistakes reads a refusal: of Image Hub, of the filter in front of it, or of anything else.
function mistakes({ response, text }) {
  try {
    const said = JSON.parse(text);
    if (Array.isArray(said.errors)) return said.errors;
    if (typeof said.error === "string") return [{ field: "", cause: said.error, remedy: "" }];
  } catch { /* not ours */ }
  return [{ field: "", cause: `the answer is ${response.status} ${response.statusText}`.trim(), remedy: text.slice(0, 200).trim() }];
}

const sentence = (m) => {
  const field = { username: "The user name", password: "The password", plan: "The plan", server: "Image Hub" }[m.field];
  const cause = field && !m.cause.startsWith("user name") ? `${field} ${m.cause}` : m.cause;
  const remedy = m.remedy.replace(/ at \/(auth|signup)\b/g, ""); // those are on this page
  return `${cause.charAt(0).toUpperCase()}${cause.slice(1)}${remedy ? `; ${remedy}` : ""}.`;
};

// ---- Account

// submit runs a form once at a time, and shows what is wrong beside the fields.
function submit(id, act) {
  const form = $(id);
  const fault = $(`${id}-fault`);
  const button = form.querySelector("button");
  let busy = false;
  const show = (found) => {
    fault.textContent = found.map(sentence).join(" ");
    let first = null;
    for (const input of form.querySelectorAll("input:not([type=radio])")) {
      const wrong = found.some((m) => m.field === input.name);
      input.toggleAttribute("aria-invalid", false);
      if (wrong) {
        input.setAttribute("aria-invalid", "true");
        first ??= input;
      }
    }
    first?.focus();
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = true;
    button.setAttribute("aria-disabled", "true");
    fault.textContent = "";
    try {
      const found = await act(Object.fromEntries(new FormData(form)));
      show(found ?? []);
    } catch (err) {
      show([{ field: "", cause: err.message.replace(/\.$/, ""), remedy: "" }]);
    } finally {
      busy = false;
      button.removeAttribute("aria-disabled");
    }
  });
}

const claims = (given) => {
  try {
    const parts = given.split(".");
    const text = atob((parts[1] ?? parts[0]).replaceAll("-", "+").replaceAll("_", "/"));
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (c) => c.charCodeAt(0))));
  } catch {
    return {};
  }
};

// enter takes a token. What plan it names is what the filter goes by.
function enter(given, name) {
  token = given;
  user = name;
  plan = claims(given).plan ?? "";
  $("who").hidden = false;
  $("who-name").textContent = user;
  $("who-plan").textContent = plan;
  $("outside").hidden = true;
  $("inside").hidden = false;
  for (const radio of $("upgrade").elements.namedItem("plan")) radio.checked = radio.value === plan;
}

function leave() {
  token = user = plan = "";
  $("who").hidden = true;
  $("inside").hidden = true;
  $("outside").hidden = false;
  $("login").reset();
  $("signup").reset();
  forget();
}

async function logIn(form) {
  const answer = await call("auth", { username: form.username, password: form.password });
  if (!answer.response.ok) return mistakes(answer);
  enter(JSON.parse(answer.text).token, form.username);
  $("login").reset();
  $("signup").reset();
  forget();
  tell("", `Welcome, ${user}.`, `Your plan is ${plan}.`);
  $("pull-title").focus();
  return [];
}

submit("login", logIn);

submit("signup", async (form) => {
  const answer = await call("signup", form);
  return answer.response.ok ? logIn(form) : mistakes(answer);
});

submit("upgrade", async (form) => {
  const answer = await call("upgrade", { plan: form.plan });
  if (!answer.response.ok) return mistakes(answer);
  enter(JSON.parse(answer.text).token, user);
  forget();
  tell("", `Your plan is ${plan} now.`, "It counts from your next pull on.");
  return [];
});

$("logout").addEventListener("click", () => {
  leave();
  tell("", "Logged out.", "");
  $("login-username").focus();
});

// ---- Pulls

function tell(kind, title, text) {
  const answer = $("answer");
  answer.className = `answer ${kind}`;
  answer.hidden = false;
  $("answer-title").textContent = title;
  $("answer-text").textContent = text;
}

// forget drops what was known of the limit, which holds no longer.
function forget() {
  stopWaiting();
  left(null, null, "Pull once to see how many pulls are left");
}

function left(remaining, limit, text) {
  const bar = $("left-bar");
  $("left-number").textContent = remaining ?? "";
  $("left-text").textContent = text;
  bar.hidden = limit === null;
  bar.max = limit || 1;
  bar.value = remaining ?? 0;
}

function stopWaiting() {
  clearInterval(ticking);
  $("wait").hidden = true;
}

// waitFor counts down. It is told once, with the answer, and only seen ticking.
function waitFor(seconds) {
  stopWaiting();
  const end = performance.now() + seconds * 1000;
  const tick = () => {
    const rest = Math.ceil((end - performance.now()) / 1000);
    if (rest <= 0) {
      stopWaiting();
      tell("", "You can pull again.", "");
      return;
    }
    $("wait-seconds").textContent = rest;
    $("wait").hidden = false;
  };
  tick();
  ticking = setInterval(tick, 250);
}

// number reads a header that holds one; null when there is none.
function number(response, header) {
  const text = response.headers.get(header) ?? "";
  return /^\d{1,9}$/.test(text) ? Number(text) : null;
}

function line(kind, status, said) {
  const row = document.createElement("li");
  row.className = kind;
  const cell = (tag, name, text) => {
    const e = document.createElement(tag);
    e.className = name;
    e.textContent = text;
    row.append(e);
  };
  cell("time", "", new Date().toLocaleTimeString([], { hour12: false }));
  cell("span", "status", status);
  cell("span", "said", said);
  $("log").prepend(row);
  while ($("log").childElementCount > mostLines) $("log").lastElementChild.remove();
  $("log-empty").hidden = true;
}

// pull pulls once and returns whether a further pull makes sense.
async function pull() {
  const answer = await call("pull");
  const { response } = answer;
  const limit = number(response, "X-RateLimit-Limit");
  const remaining = number(response, "X-RateLimit-Remaining");
  const text = response.ok ? answer.text.slice(0, 200).trim() : mistakes(answer).map(sentence).join(" ");
  stopWaiting();
  if (limit !== null && remaining !== null) {
    left(remaining, limit, `of ${limit} pulls a minute left`);
  } else if (response.ok) {
    left(null, null, "Nothing limits pulls here");
  } else {
    left(null, null, "No pull was counted");
  }
  const retry = number(response, "Retry-After");
  switch (true) {
    case response.ok:
      line("", response.status, text);
      tell("", "Pulled.", text);
      return true;
    case response.status === 429:
      line("limited", 429, text);
      tell("limited", "Limit reached.", `You can pull again in ${retry ?? "some"} seconds${plan ? ", or choose a larger plan" : ""}.`);
      if (retry !== null) waitFor(retry);
      return false;
    case response.status === 401:
      line("refused", 401, text);
      if (token) {
        const name = user;
        leave();
        $("login-username").value = name;
        tell("refused", "Log in again.", `Your token is not accepted any more: ${text}`);
        $("login-password").focus();
      } else {
        tell("refused", "Log in first.", `Pulls need an account here: ${text}`);
      }
      return false;
    default:
      line("refused", response.status, text);
      tell("refused", "Not pulled.", text);
      if (retry !== null) waitFor(retry);
      return false;
  }
}

async function pulls(times) {
  if (pulling) return;
  pulling = true;
  for (const id of ["pull", "pull-ten"]) $(id).setAttribute("aria-disabled", "true");
  try {
    for (let i = 0; i < times && await pull(); i++);
  } catch (err) {
    line("refused", "–", err.message);
    tell("refused", "Not pulled.", err.message);
  } finally {
    pulling = false;
    for (const id of ["pull", "pull-ten"]) $(id).removeAttribute("aria-disabled");
  }
}

$("pull").addEventListener("click", () => pulls(1));
$("pull-ten").addEventListener("click", () => pulls(10));
