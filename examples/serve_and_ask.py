"""Serve a model and ask it through the official ``openai`` client.

python examples/serve_and_ask.py [MODEL]
"""

from __future__ import annotations

import subprocess
import sys

import openai

import paceline as pl

MODEL = sys.argv[1] if len(sys.argv) > 1 else "random:llama:tiny"
MESSAGES = [{"role": "user", "content": "What is a paceline?"}]


def main() -> None:
    command = [sys.executable, "-m", "paceline", "serve", MODEL, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = (line for line in server.stderr if line.startswith("serving"))
            address = next(lines).split()[3]
            print(f"{MODEL} is served at {address}")
            served = ask(address)
        finally:
            server.terminate()
    print(f"it answers {served!r}")
    answer = pl.Engine(MODEL).chat(MESSAGES, max_tokens=12)
    assert served == answer.text, "the server gives what the model gives in this process"


def ask(address: str) -> str:
    client = openai.OpenAI(base_url=address, api_key="none")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=12,
    )
    return answer.choices[0].message.content or ""


if __name__ == "__main__":
    main()
