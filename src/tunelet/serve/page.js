"use strict";
const $ = (id) => document.getElementById(id);
const KEY = "tunelet-key";
const turns = []; // {role, content}: the conversation as it is sent
let running = null; // AbortController of the answer that is being written
const say = (word, values) => WORDS[word].replace(/\{(\w+)\}/g, (_, name) => values[name]);

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function askForKey(wrong) {
  $("key-wrong").hidden = !wrong;
  if (!$("ask").open) $("ask").showModal();
}

$("key-form").addEventListener("submit", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  loadModels();
});

async function loadModels() {
  let reply;
  try {
    reply = await fetch("/v1/models", { headers: headers() });
  } catch {
    return note(addTurn("assistant"), WORDS.away, true);
  }
  if (reply.status === 401) return askForKey(sessionStorage.getItem(KEY) !== null);
  if (reply.status === 503) return setTimeout(loadModels, 1000); // still loading
  const found = await reply.json();
  if (!reply.ok) return note(addTurn("assistant"), say("failed", { why: found.error.message }), true);
  $("model").replaceChildren(...found.data.map((model) => new Option(model.id, model.id)));
  $("text").focus();
}

function addTurn(role, text = "") {
  $("empty").hidden = true;
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("h2");
  who.textContent = role === "user" ? WORDS.you : $("model").value || WORDS.assistant;
  const said = document.createElement("div");
  said.className = "said";
  said.textContent = text;
  const foot = document.createElement("div");
  foot.className = "foot";
  const told = document.createElement("span");
  told.className = "note";
  foot.append(told);
  turn.append(who, said, foot);
  $("log").append(turn);
  atEnd();
  return turn;
}

const atEnd = () => ($("log").scrollTop = $("log").scrollHeight);

function note(turn, text, bad = false) {
  turn.querySelector(".note").textContent = text;
  turn.classList.toggle("bad", bad);
}

function addButton(turn, word, act) {
  const button = document.createElement("button");
  button.className = "plain";
  button.type = "button";
  button.textContent = WORDS[word];
  button.addEventListener("click", () => act(button));
  turn.querySelector(".foot").prepend(button);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea"); // no clipboard without https
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = WORDS.copied;
  setTimeout(() => (button.textContent = WORDS.copy), 1500);
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function asked() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    temperature: Number($("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  const most = parseInt($("most").value, 10);
  return most > 0 ? { ...body, max_tokens: most } : body;
}

async function answer() {
  const turn = addTurn("assistant");
  const said = turn.querySelector(".said");
  const control = (running = new AbortController());
  busy(true);
  note(turn, WORDS.waiting);
  const began = performance.now();
  let text = "", end = "", tokens = 0, failed = "";
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(asked()), signal: control.signal,
    });
    if (!reply.ok) {
      if (reply.status === 401) askForKey(true);
      const found = await reply.json();
      failed = reply.status === 429 ? say("busy", { seconds: reply.headers.get("Retry-After") || "1" }) : say("failed", { why: found.error.message });
    } else {
      for await (const event of events(reply)) {
        if (event.error) failed = say("failed", { why: event.error.message });
        if (event.usage) tokens = event.usage.completion_tokens;
        for (const choice of event.choices || []) {
          if (choice.delta.content) {
            const follow = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
            text += choice.delta.content;
            said.append(choice.delta.content);
            if (follow) atEnd();
            note(turn, WORDS.writing);
          }
          end = choice.finish_reason || end;
        }
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") failed = WORDS.away;
    end = "stopped";
  }
  if (running === control) {
    running = null;
    busy(false);
  }
  if (!turn.isConnected) return; // a new chat has begun meanwhile
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const figures = tokens ? say("figures", { tokens, seconds }) : "";
  const why = end === "length" ? WORDS.cut : end === "stopped" ? WORDS.stopped : "";
  note(turn, failed || [figures, why].filter(Boolean).join(" · "), Boolean(failed));
  if (text) {
    turns.push({ role: "assistant", content: text });
    addButton(turn, "copy", (button) => copy(text, button));
  } else {
    addButton(turn, "retry", () => { if (!running) { turn.remove(); answer(); } });
  }
  atEnd();
}

function busy(on) {
  $("go").hidden = on;
  $("halt").hidden = !on;
  if (!on) $("text").focus();
}

function send() {
  const text = $("text").value.trim();
  if (!text || running || !$("model").value) return;
  $("text").value = "";
  fit();
  if (turns.length && turns[turns.length - 1].role === "user") turns.pop(); // it was not answered
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running && !$("ask").open) running.abort(); });
$("halt").addEventListener("click", () => running && running.abort());
$("new").addEventListener("click", () => {
  if (running) running.abort();
  turns.length = 0;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("text").focus();
});
$("toggle").addEventListener("click", () => {
  const open = ($("settings").hidden = !$("settings").hidden);
  $("toggle").setAttribute("aria-expanded", String(!open));
});
loadModels();
