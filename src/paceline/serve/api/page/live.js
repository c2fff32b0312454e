// The live figures: reads /metrics once a second and shows what has changed since.

const SAMPLES = 60;
const PERIOD_MS = 1000;
const history = { queue: [], kv: [], speed: [], first: [] };
let before = null;

// Sums Prometheus's lines by name; the labels do not matter to one server's page.
function read(text) {
  const found = { at: performance.now() };
  for (const line of text.split("\n")) {
    const match = /^paceline_(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) found[match[1]] = (found[match[1]] ?? 0) + Number(match[2]);
  }
  return found;
}

function show(id, text, value) {
  const tile = document.getElementById(id);
  tile.querySelector("output").textContent = text;
  const values = history[id];
  values.push(value);
  if (values.length > SAMPLES) values.shift();
  const most = Math.max(...values, 1e-9);
  const points = values.map((one, index) =>
    `${(120 * (index + SAMPLES - values.length)) / (SAMPLES - 1)},${26 - (24 * one) / most}`);
  tile.querySelector("path").setAttribute("d", `M${points.join("L")}`);
}

export function seconds(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}

function update(now) {
  show("queue", `${now.num_requests_running} · ${now.num_requests_waiting}`,
    now.num_requests_running + now.num_requests_waiting);
  show("kv", `${(100 * now.kv_cache_usage_perc).toFixed(1)} %`, now.kv_cache_usage_perc);
  if (before) {
    const speed = (now.generation_tokens_total - before.generation_tokens_total) /
      ((now.at - before.at) / 1000);
    show("speed", speed < 10 ? speed.toFixed(1) : Math.round(speed).toString(), speed);
    const name = "time_to_first_token_seconds";
    const count = now[`${name}_count`] - before[`${name}_count`];
    const last = history.first.at(-1) ?? 0;
    const mean = count > 0 ? (now[`${name}_sum`] - before[`${name}_sum`]) / count : last;
    show("first", now[`${name}_count`] > 0 && mean > 0 ? seconds(mean) : "–", mean);
  }
  before = now;
}

// `call` fetches with the key; `tell` shows how the server is.
export async function watch(call, tell) {
  for (;;) {
    if (!document.hidden) {
      try {
        const answer = await call("/metrics");
        if (answer.ok) {
          update(read(await answer.text()));
          const ready = await call("/ready");
          const { status } = await ready.json();
          tell(ready.ok ? "ready" : status, ready.ok);
        } else if (answer.status !== 401) {
          tell(`error ${answer.status}`, false);
        }
      } catch {
        tell("no connection", false);
        before = null;
      }
    }
    await new Promise((done) => setTimeout(done, PERIOD_MS));
  }
}
