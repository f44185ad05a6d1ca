"use strict";
const words = JSON.parse(document.getElementById("words").textContent);
const $ = (id) => document.getElementById(id);
const pairs = document.body.dataset.pairs === "1";
const TIE = -1;
let state = null, item = null, since = 0, form = null, queue = Promise.resolve();
// One after the other: keys pressed while an answer is being saved go to the item that is shown then.
const run = (does) => { queue = queue.then(does).catch((error) => { console.error(error); }); };

const say = (key, values = {}) => (words[key] || key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
const make = (tag, classes, text) => {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
};
const named = (status) => say("status_" + (pairs && status === "accepted" ? "judged" : status));
const tell = (text) => { $("told").textContent = text; };

async function call(path, body) {
  const options = body === undefined ? {} :
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let reply;
  try { reply = await fetch("api/" + path, options); } catch { tell(say("error_gone")); return null; }
  const found = await reply.json().catch(() => ({ error: "gone" }));
  if (reply.ok) return found;
  tell(say("error_" + found.error) + (found.detail ? " " + found.detail : ""));
  return null;
}

// -- what is shown

function showState() {
  const strip = $("strip");
  if (strip.children.length !== state.total) {
    strip.classList.toggle("many", state.total > 60);
    strip.replaceChildren(...state.statuses.map((_, number) => {
      const step = make("button");
      step.type = "button";
      step.tabIndex = -1;
      step.onclick = () => run(() => go(number));
      return step;
    }));
  }
  state.statuses.forEach((status, number) => {
    const step = strip.children[number], classes = status + (number === item.number ? " here" : "");
    if (step.className === classes) return;  // there may be thousands, of which two change
    step.className = classes;
    step.title = step.ariaLabel = `${number + 1}: ${named(status)}`;
  });
  const of = state.agreement;
  const sign = of.measure === "krippendorff_alpha" ? "α" : "κ";
  const agreed = !of.items ? say("agreement_none") : of.value === null ? say("agreement_undefined", of) :
    say("agreement", { sign, value: of.value.toFixed(2), items: of.items });
  $("progress").textContent = say("of_done", state) + " · " + agreed;
}

function showPassage() {
  const box = $("passage");
  box.replaceChildren(item.passage);
  const wanted = item.evidence.trim().split(/\s+/).filter(Boolean);
  if (!wanted.length) return;
  const pattern = wanted.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("\\s+");
  const at = item.passage.match(new RegExp(pattern, "i"));
  if (!at) return;
  const mark = make("mark", "", at[0]);
  box.replaceChildren(item.passage.slice(0, at.index), mark, item.passage.slice(at.index + at[0].length));
  box.scrollTop = Math.max(0, mark.offsetTop - box.offsetTop - box.clientHeight / 2);
}

function showChoices() {
  const of = item.edited || item;
  const answered = item.chosen !== null, key = item.edited ? item.edited.answer : item.key;
  $("choices").replaceChildren(...of.choices.map((text, place) => {
    const choice = make("button", "choice");
    choice.type = "button";
    if (place === item.chosen) choice.classList.add("chosen");
    if (key !== null && place === key) choice.classList.add("key");
    if (key !== null && place === item.chosen && place !== key) choice.classList.add("off");
    const note = key === null ? "" : place === key ? "✔" : place === item.chosen ? "✘" : "";
    choice.append(make("kbd", "", String(place + 1)), make("span", "", text), make("i", "", note));
    if (answered && !pairs) choice.ariaDisabled = "true";
    choice.setAttribute("aria-pressed", String(place === item.chosen));
    choice.onclick = () => run(() => choose(place));
    return choice;
  }));
}

function show() {
  closeForm();
  tell("");
  $("number").textContent = say("item", { number: item.number + 1, total: state.total });
  $("status").textContent = named(item.status);
  $("status").className = "chip " + item.status;
  $("where").textContent = item.where;
  $("question").textContent = pairs ? say("ask_pairs") : (item.edited || item).question;
  showPassage();
  showChoices();
  const said = $("said");
  said.className = "";
  if (item.status === "rejected") {
    said.textContent = say("reason_" + item.reason) + (item.note ? ": " + item.note : "");
  } else if (item.chosen === null) {
    said.textContent = say(pairs ? "choose_pairs" : "choose_blind");
    said.className = "soft";
  } else if (pairs) {
    said.textContent = item.chosen === TIE ? say("tie") : "";
  } else if (item.status === "edited") {
    said.textContent = say("original") + ": " + item.question + " (" + item.choices[item.key] + ")";
    said.className = "soft";
  } else if (item.chosen === item.key) {
    said.textContent = say("right");
    said.className = "good";
  } else if (item.status === "accepted") {
    said.textContent = say("accepted_key");
  } else {
    said.textContent = say("wrong", { key: item.key + 1 }) + " " + say("wrong_next");
    said.className = "off";
  }
  for (const button of document.querySelectorAll("[data-do]")) {
    const seen = item.chosen !== null;
    button.disabled = { accept: !seen, edit: !seen, previous: item.number === 0,
      next: item.number === state.total - 1 }[button.dataset.do] || false;
  }
  if (state.first === null && state.total) $("said").append(" " + say("all_done"));
  showState();
}

// -- what is done

async function load(number) {  // without a number: the first that is not done
  state = await call("state");
  if (!state) return;
  const wanted = number === undefined ? state.first ?? 0 : number;
  const found = await call("item/" + wanted);
  if (!found) return;
  if (!item || item.number !== found.number) since = performance.now();
  item = found;
  show();
}

async function go(number) {
  if (state && number >= 0 && number < state.total) await load(number);
}

async function nextOpen() {
  const rest = state.statuses.map((status, number) => [status, number])
    .filter(([status]) => status === "open" || status === "disputed").map(([, number]) => number);
  if (rest.length) await go(rest.find((number) => number > item.number) ?? rest[0]);
  return rest.length > 0;
}

async function act(kind, body = {}, goOn = false) {
  body.seconds = Math.round((performance.now() - since) / 100) / 10;
  const found = await call(`item/${item.number}/${kind}`, body);
  if (!found) return;
  item = found;
  if (goOn) {
    state.statuses[item.number] = item.status;
    if (await nextOpen()) return;
  }
  state = await call("state") || state;
  show();
}

async function choose(place) {
  if (place !== TIE && place >= item.choices.length) return;
  if (!pairs && item.chosen !== null) return;
  await act("choose", { choice: place }, pairs && item.chosen === null);
}

function openForm(name) {
  closeForm();
  form = $(name);
  document.body.classList.add("forming");
  if (name === "edit") document.body.classList.add("editing");
  if (name === "edit") {
    const of = item.edited || { ...item, answer: item.key };
    $("edit-question").value = of.question;
    $("edit-choices").replaceChildren(...of.choices.map((text, place) => {
      const line = make("div", "edit-choice"), mark = make("input"), box = make("input");
      Object.assign(mark, { type: "radio", name: "edit-key", checked: place === of.answer });
      Object.assign(box, { type: "text", value: text, maxLength: 2000 });
      mark.ariaLabel = box.ariaLabel = String(place + 1);
      line.append(mark, box);
      return line;
    }));
  } else {
    form.reset();
  }
  form.hidden = false;
  (name === "edit" ? $("edit-question") : form.querySelector("input")).focus();
  form.scrollIntoView({ block: "nearest" });
}

function closeForm() {
  if (form) form.hidden = true;
  form = null;
  document.body.classList.remove("forming", "editing");
  if (document.activeElement && document.activeElement !== document.body) document.activeElement.blur();
}

$("edit").onsubmit = (event) => {
  event.preventDefault();
  const lines = [...$("edit-choices").children];
  const body = {
    question: $("edit-question").value,
    choices: lines.map((line) => line.children[1].value),
    answer: lines.findIndex((line) => line.children[0].checked),
  };
  run(() => act("edit", body));
};
$("reject").onsubmit = (event) => {
  event.preventDefault();
  const picked = $("reject").querySelector("input:checked");
  if (!picked) { tell(say("error_bad_reason")); return; }
  const body = { reason: picked.value, note: $("reject-note").value };
  run(() => act("reject", body));
};

const doing = {
  previous: () => go(item.number - 1),
  next: () => go(item.number + 1),
  accept: () => item.chosen !== null ? act("accept") : tell(say("error_blind")),
  edit: () => item.chosen !== null ? openForm("edit") : tell(say("error_blind")),
  reject: () => openForm("reject"),
  tie: () => choose(TIE),
};
for (const button of document.querySelectorAll("[data-do]")) {
  button.onclick = () => item && run(doing[button.dataset.do]);
}
for (const button of document.querySelectorAll("[data-cancel]")) button.onclick = closeForm;
$("help").onclick = () => $("keys").showModal();
$("keys-close").onclick = () => $("keys").close();

const keys = { j: doing.next, k: doing.previous, ArrowRight: doing.next, ArrowLeft: doing.previous, x: doing.reject,
  o: nextOpen, ...(pairs ? { t: doing.tie, 3: doing.tie } : { a: doing.accept, e: doing.edit }) };

document.addEventListener("keydown", (event) => {
  if (!item || $("keys").open || event.isComposing) return;
  const typing = event.target.matches("textarea, input[type=text]");
  if (event.key === "Escape" && form) { closeForm(); return; }
  if (event.key === "Enter" && form && (event.ctrlKey || event.metaKey || (form.id === "reject" && !typing))) {
    event.preventDefault();
    form.requestSubmit();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") { $("keys").showModal(); return; }
  // With Hangul switched on the same keys give other letters: the place of the key counts then.
  const letter = /^Key[A-Z]$/.test(event.code) ? event.code.slice(3).toLowerCase() : event.key;
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  const does = keys[event.key] || keys[letter];
  if (!does && !digit) return;
  if (!form) event.preventDefault();
  run(() => {
    if (!form) return does ? does() : choose(digit - 1);
    const reason = form.id === "reject" && form.querySelectorAll("[name=reason]")[digit - 1];
    if (reason) { reason.checked = true; reason.focus(); }
  });
});

run(load);
