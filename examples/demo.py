"""From a real model to a served answer, in a few minutes on two cores.

SmolLM2-135M-Instruct is fetched, trained on two ranks, killed, resumed, exported, served, and
asked a question by the official `openai` client. Every step is a command that you can type.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

MODEL = "smollm2-135m"
PLAN = """\
[mesh]
dp_shard = 2
[train]
sequence_length = 64
tokens_per_step = 512
[precision]
compute = "auto"
[optimizer]
lr = 1e-4
[checkpoint]
interval_steps = 10
"""
STEPS, SAVED_AT = 20, 10
QUESTION = "What is the capital of France?"


def main() -> None:
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-demo-") as name:
        folder = Path(name)
        plan, run, exported = folder / "plan.toml", folder / "run", folder / "exported"
        plan.write_text(PLAN)
        paceline("fetch", MODEL)
        killed_at = train_until_killed(plan, run)
        paceline("train", "--resume", run)
        losses = check_resumed(run)
        paceline("checkpoint", "export", run, "-o", exported)
        with served(exported) as address:
            answer = ask(address)
    minutes, seconds = divmod(round(time.monotonic() - start_s), 60)
    print(f"""
{MODEL}, two ranks, {STEPS} steps: loss {losses[1]:.3f} -> {losses[STEPS]:.3f}
killed after step {killed_at}, resumed from step {SAVED_AT}: what ran twice gave the same losses
exported, served, asked: {QUESTION!r}
answered: {answer!r}
all of it in {minutes} min {seconds} s""")


def paceline(*arguments: object) -> None:
    """Runs a command, shown as one would type it."""
    subprocess.run(command(*arguments), check=True)


def command(*arguments: object) -> list[str]:
    texts = [str(argument) for argument in arguments]
    print(f"\n$ paceline {' '.join(texts)}", flush=True)
    return [sys.executable, "-m", "paceline", *texts]


def train_until_killed(plan: Path, run: Path) -> int:
    """Trains, and pulls the plug two steps or more after a save, once that is on disk."""
    data = ("--data", "builtin:python-stdlib", "--steps", STEPS)
    process = subprocess.Popen(command("train", MODEL, *data, "--plan", plan, "--out", run))
    saved = run / "checkpoints" / f"step-{SAVED_AT}" / "manifest.json"
    while not (saved.exists() and SAVED_AT + 2 in (step for step, _ in logged(run))):
        if process.poll() is not None:
            sys.exit(f"training ended early, with exit code {process.returncode}")
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)  # ranks notice within half a second that their launcher is gone
    killed_at = logged(run)[-1][0]
    print(f"\nkilled after step {killed_at}", flush=True)
    return killed_at


def logged(run: Path) -> list[tuple[int, float]]:
    """Steps and losses in the order in which they were logged."""
    records = run / "records" / "rank-0.jsonl"
    lines = records.read_text().split("\n")[:-1] if records.exists() else []
    parsed = (json.loads(line) for line in lines)
    return [(r["step"], r["loss"]) for r in parsed if r["kind"] == "step"]


def check_resumed(run: Path) -> dict[int, float]:
    """The losses by step, if the steps that ran twice gave the same and the loss has fallen."""
    losses: dict[int, float] = {}
    for step, loss in logged(run):
        if losses.setdefault(step, loss) != loss:
            sys.exit(f"step {step} gave {losses[step]} before the kill and {loss} after it")
    first, last = (sum(losses[s] for s in steps) / 5 for steps in (range(1, 6), range(16, 21)))
    if last >= first:
        sys.exit(f"the loss has not fallen: {first:.3f} over 5 steps, then {last:.3f}")
    return losses


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server that is up."""
    arguments = command("serve", folder, "--served-model-name", MODEL, "--port", 0)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="")
            if line.startswith("serving"):
                yield line.split()[3]
                return
        sys.exit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def ask(address: str) -> str:
    """One question through the official client."""
    client = openai.OpenAI(base_url=address, api_key="none")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
    )
    return answer.choices[0].message.content or ""


if __name__ == "__main__":
    main()
