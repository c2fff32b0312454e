"""Load a model, ask it for text, and see that the text is what its logits say.

python examples/load_and_generate.py [MODEL]
"""

from __future__ import annotations

import sys

import torch

import paceline as pl

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
PROMPT = "The capital of France is"


@torch.inference_mode()
def main() -> None:
    engine = pl.Engine(MODEL, pl.Plan(serve=pl.ServeConfig(dtype="float32")))
    greedy, again = engine.generate([PROMPT, PROMPT], max_tokens=12)
    assert greedy == again, "an answer does not depend on what else is asked"
    print(f"{PROMPT!r} goes on with {greedy.text!r}")

    sampling = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.95, "seed": 7}
    sampled = engine.generate(PROMPT, **sampling)[0]
    assert sampled == engine.generate(PROMPT, **sampling)[0], "a seed decides what is sampled"
    print(f"or, at temperature 0.8 and seed 7, with {sampled.text!r}")

    answer = engine.chat([{"role": "user", "content": "Name one planet."}], max_tokens=24)
    print(f"Name one planet. {answer.text!r} ({answer.finish_reason})")

    loaded = pl.load(MODEL, dtype="float32")
    logits_BTV = loaded.model(torch.tensor([loaded.tokenizer.encode(PROMPT)]))
    likeliest = int(logits_BTV[0, -1].argmax())
    assert likeliest == greedy.token_ids[0], "greedy text starts with the likeliest token"
    print(f"{loaded.spec.num_parameters:,} parameters; likeliest next token: {likeliest}")


if __name__ == "__main__":
    main()
