// The chat. What the model says is text and is only ever set as text.

import { seconds, watch } from "/page/live.js";

const get = (id) => document.getElementById(id);
const KEY = "paceline-key";
const turns = [];
let model = null;
let current = null;
let asking = null;

// Fetches with the key; where the server wants another, asks for it once and tries again.
async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status !== 401) return answer;
  asking ??= askKey().finally(() => { asking = null; });
  await asking;
  return call(path, options);
}

function askKey() {
  const dialog = get("ask-key");
  tell("needs a key", false);
  get("key").value = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, get("key").value.trim());
      done();
    }, { once: true });
  });
}

function tell(text, good) {
  const status = get("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("good", good);
  status.classList.toggle("bad", !good);
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function addTurn(role, text) {
  get("hello")?.remove();
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  turn.append(element("pre", "", text));
  get("log").append(turn);
  get("log").scrollTop = get("log").scrollHeight;
  return turn;
}

function body() {
  const number = (id) => (get(id).value === "" ? undefined : Number(get(id).value));
  const system = get("system").value.trim();
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

// The events of a stream, each a JSON object, however its bytes are cut.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Writes an answer as it comes; gives its text and what is to be told of it.
async function write(answer, turn, begun, said) {
  const text = turn.querySelector("pre");
  let first = null;
  let usage = null;
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const part = event.choices[0]?.delta?.content;
    if (!part) continue;
    first ??= performance.now();
    said.text += part;
    const log = get("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    text.append(part);
    if (follows) log.scrollTop = log.scrollHeight;
  }
  const now = performance.now();
  const count = usage?.completion_tokens ?? 0;
  const speed = first && count > 1 ? (1000 * (count - 1)) / (now - first) : null;
  return [
    count && `${count} tokens`,
    first && `first after ${seconds((first - begun) / 1000)}`,
    speed && `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
  ].filter(Boolean).join(" · ");
}

async function problem(answer) {
  const told = await answer.json().catch(() => null);
  const wait = answer.headers.get("retry-after");
  const text = told?.error?.message ?? `error ${answer.status}`;
  return wait ? `${text}; try again in ${wait} s` : text;
}

async function send(text) {
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  const note = element("p", "told");
  turn.classList.add("busy");
  current = new AbortController();
  setBusy(true);
  const said = { text: "" };
  try {
    if (!model) await loadModel();
    const options = { method: "POST", signal: current.signal, body: JSON.stringify(body()) };
    options.headers = { "content-type": "application/json" };
    const begun = performance.now();
    const answer = await call("/v1/chat/completions", options);
    if (!answer.ok) throw new Error(await problem(answer));
    note.textContent = await write(answer, turn, begun, said);
  } catch (error) {
    const stopped = error.name === "AbortError";
    note.textContent = stopped ? "stopped" : error.message;
    note.classList.toggle("bad", !stopped);
  }
  if (said.text) turns.push({ role: "assistant", content: said.text });
  else turns.pop(); // a question without an answer is not part of the conversation
  turn.classList.remove("busy");
  turn.append(note);
  get("log").scrollTop = get("log").scrollHeight;
  current = null;
  setBusy(false);
}

function setBusy(busy) {
  get("send").hidden = busy;
  get("stop").hidden = !busy;
  get("log").setAttribute("aria-busy", String(busy));
  if (!busy) get("prompt").focus();
}

async function loadModel() {
  const answer = await call("/v1/models");
  if (!answer.ok) throw new Error(await problem(answer));
  model = (await answer.json()).data[0].id;
  get("model").textContent = model;
  document.title = `${model} · Paceline`;
}

function submit() {
  const prompt = get("prompt");
  const text = prompt.value.trim();
  if (!text || current) return;
  prompt.value = "";
  fit();
  send(text);
}

function fit() {
  const prompt = get("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function clear() {
  current?.abort();
  turns.length = 0;
  get("log").replaceChildren();
  get("prompt").focus();
}

get("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
get("stop").addEventListener("click", () => current?.abort());
get("clear").addEventListener("click", clear);
get("prompt").addEventListener("input", fit);
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") current?.abort(); });
for (const id of ["temperature", "top_p"]) {
  const shown = document.querySelector(`output[for="${id}"]`);
  get(id).addEventListener("input", () => { shown.textContent = get(id).value; });
}
get("settings").open = matchMedia("(min-width: 60rem)").matches;
loadModel().catch(() => tell("no connection", false));
watch(call, tell);
