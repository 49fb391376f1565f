// The page: state, keys, drawing. Texts of models only ever become text nodes.

import { WORDS, KEYS } from "./words.js";

const $ = (id) => document.getElementById(id);
const CHOICE_KEYS = "1234567890abcdefghijklmnopqrstuvwxyz";
const LONG = 320; // characters from which an answer that is not selected is cut short

const state = {
  language: remembered("language") === "en" ? "en" : "zh",
  annotator: remembered("annotator") || "",
  start: null, // taxonomy, reasons, letters
  progress: null,
  item: null,
  ranks: [], // of each answer in the order shown: 1.. or null
  category: null,
  selected: 0,
  history: [],
  since: 0,
  busy: false,
  message: null, // [word, values, is it an error]
};

// -- small things

function remembered(name) {
  try { return localStorage.getItem(`rank.${name}`); } catch { return null; }
}

function remember(name, value) {
  try { localStorage.setItem(`rank.${name}`, value); } catch { /* private windows may refuse */ }
}

function word(key, values = {}) {
  const text = WORDS[state.language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(key, values = {}, error = false) {
  state.message = key ? [key, values, error] : null;
  drawMessage();
}

async function call(name, body) {
  let response;
  try {
    response = await fetch(`api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw { error: "not_reached", detail: "" };
  }
  const answer = await response.json().catch(() => ({ error: "not_reached" }));
  if (!response.ok) throw answer;
  return answer;
}

// One request at a time: a key pressed twice must not save twice.
async function alone(work) {
  if (state.busy) return;
  state.busy = true;
  try {
    await work();
  } catch (failure) {
    if (!failure?.error) throw failure;
    if (failure.error === "bad_name") return askName(word("bad_name"));
    const known = ["not_saved", "not_reached", "closed"].includes(failure.error);
    say(known ? failure.error : "refused", { detail: failure.detail || failure.error }, true);
  } finally {
    state.busy = false;
  }
}

// -- ranks: an array of tiers, best first, each an array of answers in the order shown

function tiers() {
  const ranks = [...new Set(state.ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
  return ranks.map((rank) => state.ranks.flatMap((r, i) => (r === rank ? [i] : [])));
}

function order() {
  return [...tiers().flat(), ...state.ranks.flatMap((rank, i) => (rank === null ? [i] : []))];
}

function setTiers(found) {
  const ranks = state.ranks.map(() => null);
  found.filter((tier) => tier.length).forEach((tier, place) => tier.forEach((i) => { ranks[i] = place + 1; }));
  state.ranks = ranks;
}

function change(work) {
  const before = { ranks: [...state.ranks], category: state.category, selected: state.selected };
  work();
  if (before.ranks.some((rank, i) => rank !== state.ranks[i]) || before.category !== state.category) {
    state.history.push(before);
    say(null);
  }
  draw();
  focusSelected();
}

function setRank(rank) {
  if (rank > state.ranks.length) return;
  change(() => {
    state.ranks[state.selected] = rank;
    const left = state.ranks.indexOf(null); // the next one to be ranked, in reading order
    if (left >= 0) state.selected = left;
  });
}

function clearRank() {
  change(() => { state.ranks[state.selected] = null; });
}

// The tiers without an answer, and where it was: [tiers, place, was it tied].
function without(answer) {
  const found = tiers();
  const place = found.findIndex((tier) => tier.includes(answer));
  if (place < 0) return [found, found.length, false];
  const tied = found[place].length > 1;
  const left = found.map((tier) => tier.filter((i) => i !== answer));
  return [tied ? left : left.filter((tier) => tier.length), place, tied];
}

function move(step) {
  const ranked = state.ranks[state.selected] !== null;
  if (!ranked && step > 0) return;
  change(() => {
    const [found, place, tied] = without(state.selected);
    let target = place;
    if (ranked && tied) target = step < 0 ? place : place + 1;
    else if (ranked) target = Math.max(0, place + step);
    found.splice(target, 0, [state.selected]);
    setTiers(found);
  });
}

function tieWithAbove() {
  const shown = order();
  const above = shown[shown.indexOf(state.selected) - 1];
  if (above !== undefined) place(state.selected, above, "tie");
}

// Puts an answer above, below or level with another; beside one without a rank it comes last.
function place(answer, target, how) {
  if (answer === target) return;
  change(() => {
    state.selected = answer;
    const [found] = without(answer);
    const at = found.findIndex((tier) => tier.includes(target));
    if (at < 0) found.push([answer]);
    else if (how === "tie") found[at].push(answer);
    else found.splice(how === "above" ? at : at + 1, 0, [answer]);
    setTiers(found);
  });
}

// -- what is done with an item

function show(answer, message = null, values = {}) {
  state.progress = answer.progress;
  state.item = answer.item;
  state.history = [];
  state.since = performance.now();
  if (state.item) {
    state.ranks = state.item.ranks ? [...state.item.ranks] : state.item.answers.map(() => null);
    state.category = state.item.category;
    state.selected = order()[0];
  }
  say(message, values);
  draw();
  if (state.item) {
    $("prompt").scrollTop = 0;
    focusSelected();
    window.scrollTo(0, 0);
  } else if (!document.querySelector("dialog[open]")) {
    $("done").focus();
  }
}

function next(leaving = null) {
  return alone(async () => show(await call("next", { annotator: state.annotator, leaving })));
}

function save(skipped = null) {
  if (!state.item) return;
  if (skipped === null) {
    const count = state.ranks.filter((rank) => rank === null).length;
    if (count) {
      if (state.ranks[state.selected] !== null) state.selected = state.ranks.indexOf(null);
      draw();
      focusSelected();
      return say("missing", { count }, true);
    }
    if (state.start.taxonomy.length && state.category === null) return chooseCategory(() => save());
  }
  return alone(async () => {
    say("saving");
    const answer = await call("save", {
      annotator: state.annotator,
      item: state.item.key,
      ranks: skipped === null ? state.ranks : null,
      skipped,
      category: state.category,
      seconds: (performance.now() - state.since) / 1000,
    });
    show(answer, "saved");
  });
}

function undo() {
  const before = state.history.pop();
  if (before && state.item) {
    Object.assign(state, before);
    say(null);
    draw();
    return focusSelected();
  }
  const key = state.item?.key ?? null;
  return alone(async () => {
    const answer = await call("previous", { annotator: state.annotator, item: key });
    if (!answer.item || answer.item.key === key) return say("nothing_to_undo");
    const reason = answer.item.skipped;
    show(answer, reason ? "was_skipped" : "went_back", { reason: reason && word(reason) });
  });
}

function choose(title, options, chosen, then) {
  $("chooser-title").textContent = title;
  $("choices").replaceChildren(...options.map(([value, text], i) => {
    const button = element("button", { type: "button" }, element("span", { textContent: text }));
    if (CHOICE_KEYS[i]) button.prepend(element("kbd", { textContent: CHOICE_KEYS[i] }));
    button.setAttribute("aria-pressed", String(value === chosen));
    button.onclick = () => { $("chooser").close(); then(value); };
    return button;
  }));
  $("chooser").showModal();
  ($("choices").querySelector("[aria-pressed=true]") ?? $("choices").firstElementChild).focus();
}

function chooseCategory(then = () => {}) {
  if (!state.item || !state.start.taxonomy.length) return;
  const options = state.start.taxonomy.map((name) => [name, name]);
  choose(word("choose_category"), options, state.category, (name) => {
    change(() => { state.category = name; });
    then();
  });
}

function chooseReason() {
  if (!state.item) return;
  const options = state.start.reasons.map((reason) => [reason, word(reason)]);
  choose(word("choose_reason"), options, state.item.skipped, (reason) => save(reason));
}

function askName(error = "") {
  $("name").value = state.annotator;
  $("name-error").textContent = error;
  if (!$("name-dialog").open) $("name-dialog").showModal();
  $("name").select();
}

// -- drawing

function draw() {
  document.documentElement.lang = word("lang");
  document.title = `${word("title")} · ChatYuan`;
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-title]")) node.title = word(node.dataset.title);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", word(node.dataset.label));
  $("language").textContent = word("other");
  $("language").lang = state.language === "zh" ? "en" : "zh-CN";
  $("who").textContent = state.annotator;
  $("who").hidden = !state.annotator;
  $("keys").replaceChildren(...KEYS.map(([keys, text]) => element("tr", {},
    element("th", {}, ...keys.flatMap((key) => [element("kbd", { textContent: key }), " "])),
    element("td", { textContent: word(text) }))));
  $("work").hidden = $("tools").hidden = !state.item;
  $("done").hidden = Boolean(state.item) || !state.progress;
  drawMessage();
  drawProgress();
  if (state.item) drawItem();
  else $("answers").replaceChildren();
}

function drawMessage() {
  const [key, values, error] = state.message ?? ["", {}, false];
  $("message").textContent = key ? word(key, values) : "";
  $("message").classList.toggle("error", Boolean(error));
}

function drawProgress() {
  $("panel").hidden = !state.progress;
  if (!state.progress) return;
  const progress = state.progress, agreed = progress.agreement;
  $("bar").max = progress.items;
  $("bar").value = progress.finished;
  $("bar-text").textContent = `${progress.finished} / ${progress.items}`;
  $("done-text").textContent = word("done_text", progress);
  $("again").hidden = !progress.mine;
  const percent = (share) => `${(100 * share).toFixed(1)}%`, plain = (value) => value.toFixed(2);
  const rows = [
    ["f_mine", progress.mine], ["f_skipped", progress.mine_skipped],
    ["f_finished", `${progress.finished} / ${progress.items}`],
    ["f_waiting", progress.waiting], ["f_annotators", progress.annotators],
    ["f_items", agreed.items], ["f_pair_agreement", agreed.pair_agreement, percent],
    ["f_kappa", agreed.kappa, plain], ["f_tau", agreed.tau, plain],
  ];
  if (agreed.category_agreement !== null) {
    rows.push(["f_category_agreement", agreed.category_agreement, percent], ["f_category_kappa", agreed.category_kappa, plain]);
  }
  $("figures").replaceChildren(...rows.flatMap(([key, value, show = String]) => [
    element("dt", { textContent: word(key) }),
    element("dd", { textContent: value === null ? "–" : show(value) }),
  ]));
}

function drawItem() {
  if ($("prompt").textContent !== state.item.prompt) $("prompt").textContent = state.item.prompt;
  $("answers").replaceChildren(...order().map(card));
  const asked = state.start.taxonomy.length > 0;
  $("category").hidden = !asked;
  $("category").replaceChildren(
    state.category === null ? word("no_category_yet") : word("category", { name: state.category }),
    " ", element("kbd", { textContent: "C" }));
}

function card(answer) {
  const rank = state.ranks[answer], letter = state.start.letters[answer];
  const text = state.item.answers[answer];
  const said = rank === null ? word("unranked") : word("rank", { rank });
  const tied = rank !== null && state.ranks.filter((other) => other === rank).length > 1;
  const grip = element("div", { className: "grip", title: word("drag") },
    element("span", { className: "letter", textContent: letter }),
    element("span", { className: rank === null ? "rank none" : "rank", textContent: said }));
  if (tied) grip.append(element("span", { className: "tied", textContent: word("tied") }));
  const long = text.length > LONG || text.split("\n").length > 6;
  const made = element("li", { className: "answer" }, grip,
    element("div", { className: long ? "text long" : "text", textContent: text }));
  const current = answer === state.selected;
  made.classList.toggle("selected", current);
  made.dataset.answer = answer;
  made.tabIndex = current ? 0 : -1;
  if (current) made.setAttribute("aria-current", "true");
  const name = word("card", { letter, rank: tied ? `${said} (${word("tied")})` : said, count: state.ranks.length });
  made.setAttribute("aria-label", `${name}: ${text}`);
  grip.addEventListener("pointerdown", (event) => drag(event, answer));
  made.addEventListener("click", () => { if (state.selected !== answer) select(answer); });
  return made;
}

function select(answer) {
  state.selected = answer;
  draw();
  focusSelected();
}

function cardOf(answer) {
  return $("answers").querySelector(`[data-answer="${answer}"]`);
}

function focusSelected() {
  if (document.querySelector("dialog[open]")) return;
  const made = cardOf(state.selected);
  made?.focus({ preventScroll: true });
  made?.scrollIntoView({ block: made.offsetHeight > innerHeight * 0.7 ? "start" : "nearest" });
}

// -- the mouse, a pen or a finger

function drag(event, answer) {
  if (event.button !== 0) return;
  event.preventDefault();
  const grip = event.currentTarget, start = event.clientY;
  let drop = null, moving = false;
  const clear = () => document.querySelectorAll(".answer").forEach(
    (made) => made.classList.remove("drop-above", "drop-below", "drop-tie", "dragged"));
  const moved = (now) => {
    moving ||= Math.abs(now.clientY - start) > 5;
    if (!moving) return;
    if (now.clientY < 60) scrollBy(0, -20);
    if (now.clientY > innerHeight - 90) scrollBy(0, 20);
    clear();
    cardOf(answer)?.classList.add("dragged");
    drop = dropAt(now.clientY, answer);
    if (drop) cardOf(drop[0]).classList.add(`drop-${drop[1]}`);
  };
  const ended = (last) => {
    grip.removeEventListener("pointermove", moved);
    clear();
    if (moving && drop && last.type === "pointerup") place(answer, ...drop);
  };
  grip.setPointerCapture(event.pointerId);
  grip.addEventListener("pointermove", moved);
  grip.addEventListener("pointerup", ended, { once: true });
  grip.addEventListener("pointercancel", ended, { once: true });
}

// The nearest other answer and what dropping there means.
function dropAt(y, answer) {
  let best = null, nearest = Infinity;
  for (const made of document.querySelectorAll(".answer")) {
    if (Number(made.dataset.answer) === answer) continue;
    const { top, bottom, height } = made.getBoundingClientRect();
    const away = Math.max(top - y, y - bottom, 0);
    const share = (y - top) / height;
    if (away < nearest) {
      nearest = away;
      best = [Number(made.dataset.answer), share < 0.3 ? "above" : share > 0.7 ? "below" : "tie"];
    }
  }
  return best;
}

// -- keys; `code` names the key whatever the input method makes of it

function keyed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const open = document.querySelector("dialog[open]");
  if (open) return open === $("chooser") ? keyedChooser(event) : undefined;
  // A button that has the focus is pressed by Enter and Space as everywhere.
  if (event.code === "Enter" && event.target.closest("button")) return;
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || event.code.startsWith("Arrow")) action();
}

function actionOf(event) {
  const { code, key, shiftKey } = event;
  if (key === "?" || key === "？") return () => $("help").showModal();
  if (code === "KeyL") return switchLanguage;
  if (code === "KeyZ") return undo;
  if (!state.annotator) return null;
  if (!state.item) return code === "Enter" ? () => next() : null;
  if (code === "ArrowUp" || code === "ArrowDown") {
    if (event.target === $("prompt")) return shiftKey ? null : leavePromptAt(code);
    const step = code === "ArrowUp" ? -1 : 1;
    return shiftKey ? () => move(step) : () => selectBy(step);
  }
  const digit = /^(?:Digit|Numpad)([0-9])$/.exec(code)?.[1];
  if (digit && !shiftKey) return digit === "0" ? clearRank : () => setRank(Number(digit));
  if (code === "Delete" || code === "Backspace") return clearRank;
  if (key === "=" || key === "＝") return tieWithAbove;
  if (code === "Enter" || code === "NumpadEnter") return () => save();
  return { KeyC: () => chooseCategory(), KeyS: chooseReason, KeyP: () => $("prompt").focus() }[code] ?? null;
}

// Arrows scroll a long prompt that has the focus; at its end they go on to the answers.
function leavePromptAt(code) {
  const box = $("prompt");
  const end = code === "ArrowDown" && box.scrollTop + box.clientHeight >= box.scrollHeight - 1;
  return end ? focusSelected : null;
}

function selectBy(step) {
  const shown = order(), at = shown.indexOf(state.selected) + step;
  if (shown[at] !== undefined) select(shown[at]);
}

function keyedChooser(event) {
  const buttons = [...$("choices").children], now = buttons.indexOf(document.activeElement);
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.code];
  const pressed = /^(?:Digit|Numpad|Key)([0-9A-Z])$/.exec(event.code)?.[1].toLowerCase();
  const chosen = pressed && !event.shiftKey ? buttons[CHOICE_KEYS.indexOf(pressed)] : undefined;
  if (step) buttons[(now + step + buttons.length) % buttons.length].focus();
  else if (chosen && !event.repeat) chosen.click();
  else return;
  event.preventDefault();
}

function switchLanguage() {
  state.language = state.language === "zh" ? "en" : "zh";
  remember("language", state.language);
  draw();
  if (state.item) focusSelected();
}

// -- the beginning

document.addEventListener("keydown", keyed);
$("language").onclick = switchLanguage;
$("help-button").onclick = () => $("help").showModal();
$("who").onclick = () => askName();
$("save").onclick = () => save();
$("skip").onclick = chooseReason;
$("undo").onclick = undo;
$("again").onclick = undo;
$("more").onclick = () => next();
$("category").onclick = () => chooseCategory();
for (const id of ["help", "chooser"]) $(id).addEventListener("close", focusSelected);
$("name-dialog").addEventListener("close", () => { if (!state.annotator) askName(); });
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const leaving = state.annotator;
  state.annotator = $("name").value.trim();
  remember("annotator", state.annotator);
  $("name-dialog").close();
  next(leaving);
});

draw();
await alone(async () => { state.start = await call("start", {}); });
if (state.start) await (state.annotator ? next() : askName());
