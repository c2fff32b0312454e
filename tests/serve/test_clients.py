"""Clients that people use, as they are: OpenAI's, lm-eval and guidellm."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest
import torch
from asking import MESSAGES, NAME, grammar_engine, live
from engines import TOKENIZER, _model, encode, real_engine
from test_app_tools import knowing

from paceline.models.tokenizer import tokenizer_files

pytestmark = pytest.mark.cpu

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}<tool_call>"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{{ message.tool_calls or '' }}{% endfor %}"
)


class Pick(pydantic.BaseModel):
    """What to take."""

    colour: Literal["red", "blue"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def address():
    """A server around a random model whose template shows tools."""
    engine = grammar_engine()
    engine.tokenizer = knowing(TEMPLATE)
    with live(engine) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


# OpenAI's own


def test_a_schema_is_parsed(client):
    completion = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Pick, max_completion_tokens=400, seed=1
    )
    assert isinstance(completion.choices[0].message.parsed, Pick)


def test_a_call_is_parsed(client):
    completion = client.chat.completions.parse(
        model=NAME,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Pick)],
        tool_choice="required",
        max_completion_tokens=400,
        seed=1,
    )
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "Pick"
    assert isinstance(call.function.parsed_arguments, Pick)
    assert completion.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_tools_goes_on(client):
    """What came back is sent again, as the client has it."""
    tools = [openai.pydantic_function_tool(Pick)]
    first = client.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=400, seed=1
    )
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "taken"}
    for again in (message, message.model_dump()):
        second = client.chat.completions.create(
            model=NAME, messages=[*MESSAGES, again, result], max_tokens=4
        )
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_call_in_a_stream(client):
    with client.chat.completions.stream(
        model=NAME,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Pick)],
        tool_choice={"type": "function", "function": {"name": "Pick"}},
        max_completion_tokens=400,
        seed=1,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Pick)
    assert final.usage.completion_tokens > 0


def test_log_probabilities(client):
    completion = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=5, temperature=0
    )
    for token in completion.choices[0].logprobs.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 2
    whole = client.completions.create(
        model=NAME, prompt="hi", logprobs=2, max_tokens=5, echo=True, temperature=0
    )
    told = whole.choices[0].logprobs
    assert told.tokens[:2] == ["h", "i"]
    assert told.token_logprobs[0] is None
    assert told.text_offset[:3] == [0, 1, 2]


def test_many_at_once(address):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            create = client.chat.completions.create
            options = {"model": NAME, "messages": MESSAGES, "max_tokens": 9, "n": 2}
            whole = await asyncio.gather(*(create(**options, seed=seed) for seed in range(6)))
            stream = await create(**options, seed=3, stream=True, logprobs=True)
            texts = ["", ""]
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            return [[choice.message.content for choice in one.choices] for one in whole], texts

    whole, streamed = asyncio.run(ask_all())
    assert whole[3] == streamed
    assert len({text for one in whole for text in one}) == 12


def test_what_is_not_built_is_an_error_that_names_it(client):
    for fields in (
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "low"},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=MESSAGES, **fields)
        assert caught.value.param == next(iter(fields))


# Others: they run on their own, and are skipped where they are not installed


def tool(name):
    """The path of a command beside this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed here: pip install {name.replace('_', '-')}")
    return path


def run(command, folder):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = os.environ | offline | {"TQDM_DISABLE": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


QUESTIONS = [
    {"text": "The sky is", "choices": [" blue", " a fish", " grün"], "label": 0},
    {"text": "Two and two are", "choices": [" four", " 5", " 🦙"], "label": 0},
    {"text": "A hat is worn on the", "choices": [" foot", " head", " é"], "label": 1},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@torch.inference_mode()
def score(text, continuation):
    """The log-probability of a continuation, from the model itself."""
    start, ids = len(encode(text)), list(encode(text + continuation))
    rows_TV = _model()(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    return sum(float(rows_TV[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["remote", "huggingface"])
def test_lm_eval_scores_as_the_model_does(tmp_path, where):
    """`local-completions`, with the server's tokenizer and with its own copy."""
    command = tool("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    for name, content in tokenizer_files(TOKENIZER).items():
        (tmp_path / name).write_text(content)
    with live(real_engine()) as address:
        model = f"model={NAME},base_url={address}/v1/completions,max_length=500"
        model += f",tokenizer_backend={where}"
        model += f",tokenizer={tmp_path}" if where == "huggingface" else ""
        command = [command, "run", "--model", "local-completions", "--model_args", model]
        command += ["--include_path", tmp_path, "--tasks", "tiny", "--batch_size", "4"]
        run([*command, "--log_samples", "--output_path", tmp_path / "out"], tmp_path)
    (log,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        found = [float(answer[0][0]) for answer in sample["resps"]]
        doc = sample["doc"]
        expected = [score(doc["text"], choice) for choice in doc["choices"]]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures(tmp_path, path):
    command = tool("guidellm")
    for name, content in tokenizer_files(TOKENIZER).items():
        (tmp_path / name).write_text(content)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"say {n}", "output_tokens_count": 6} for n in range(8)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    with live(real_engine()) as address:
        spec = {
            "backend": {"kind": "openai_http", "target": address, "request_format": path},
            "profile": {"kind": "concurrent", "streams": [2]},
            "constraints": [{"kind": "max_requests", "count": 6}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(tmp_path)},
            "data": [{"kind": "json_file", "path": str(prompts)}],
            "outputs": [{"kind": "json", "path": str(tmp_path / "out.json")}],
        }
        (tmp_path / "config.json").write_text(json.dumps({"spec": spec}))
        run([command, "run", "--config", tmp_path / "config.json", "--disable-console"], tmp_path)
    (found,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
    assert found["metrics"]["output_token_count"]["successful"]["mean"] == 6
