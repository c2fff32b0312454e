"""``paceline generate``, and what every command does with what it is given."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

import pytest

from paceline.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

PACELINE = [sys.executable, "-m", "paceline"]
MODEL = "random:llama:tiny"


def paceline(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PACELINE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def inside(monkeypatch, capsys, *arguments):
    """The same in this process, for the many cases: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def assert_one_error(code, out, err, expected_code, message):
    assert code == expected_code, err
    assert out == ""
    assert err.startswith("error: "), err
    assert message in err
    assert "Traceback" not in err


def test_help_is_quick():
    """Under 0.3 s of processor time: all the time it takes where the machine is not busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_ = paceline("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0 < used_s < 0.3
    assert help_.returncode == 0
    assert help_.stderr == ""
    for verb in ("fetch", "check", "train", "verify", "generate", "chat", "serve", "checkpoint"):
        assert f"  {verb} " in help_.stdout


@pytest.fixture(scope="module")
def as_json():
    return paceline(
        *("generate", MODEL, "--prompt", "hi", "--json", "--dtype", "float32"),
        *("--max-tokens", "24", "--temperature", "0.9", "--top-p", "0.95", "--seed", "3"),
    )


def test_json_is_one_object_and_nothing_else(as_json):
    from paceline.decode.sampler import SamplingParams
    from paceline.plan.plan import Plan
    from paceline.serve.load import load_engine
    from paceline.serve.request import Request

    assert as_json.returncode == 0, as_json.stderr
    found = json.loads(as_json.stdout)
    engine = load_engine(MODEL, Plan().with_overrides(['serve.dtype="float32"']), device="cpu")
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=3)
    prompt_ids = tuple(engine.tokenizer.encode("hi"))
    request = Request(prompt_ids=prompt_ids, sampling=sampling, max_tokens=24)
    (answer,) = engine.generate([request])
    assert found == {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": len(answer.token_ids),
            "total_tokens": 2 + len(answer.token_ids),
        },
    }


FLOAT32 = ("--dtype", "float32", "--device", "cpu")


def test_text_goes_to_stdout(monkeypatch, capsys):
    arguments = ["generate", MODEL, "--prompt", "hi", "--seed", "3", "--temperature", "1", *FLOAT32]
    code, out, _ = inside(monkeypatch, capsys, *arguments)
    assert code == 0
    code, again, _ = inside(monkeypatch, capsys, *arguments, "--json")
    assert code == 0
    assert out == json.loads(again)["text"] + "\n"
    stop = next(c for c in out if c.isalnum())
    _, cut, _ = inside(monkeypatch, capsys, *arguments, "--stop", "never in it", "--stop", stop)
    assert cut == out[: out.index(stop)] + "\n"


def test_without_a_seed_answers_differ_and_greedy_ones_do_not(monkeypatch, capsys):
    arguments = ["generate", MODEL, "--prompt", "hi", "--max-tokens", "16", *FLOAT32]
    sampled = {inside(monkeypatch, capsys, *arguments, "--temperature", "1")[1] for _ in range(3)}
    assert len(sampled) == 3
    assert len({inside(monkeypatch, capsys, *arguments)[1] for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "smollm-135m", "--prompt", "hi"], "unknown model 'smollm-135m'"),
        (["generate", MODEL, "--prompt", "x" * 600], "the prompt has 600 tokens, the context 512"),
        (["generate", MODEL, "--prompt", "hi", "--temprature", "1"], "--temprature"),
    ],
    ids=["model", "prompt", "flag"],
)
def test_mistakes_through_the_shell(arguments, message):
    done = paceline(*arguments)
    assert_one_error(done.returncode, done.stdout, done.stderr, 2, message)
    assert done.stderr.count("error: ") == 1
    assert "\nhint: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a\udcff"], "not valid Unicode"),  # so do bytes that are not UTF-8 arrive
        (["--prompt", "x" * 400], "400 tokens of prompt and 128 of answer exceed"),
        ([], "--prompt"),
        (["--prompt", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["--prompt", "hi", "--max-tokens", "x"], "--max-tokens"),
        (["--prompt", "hi", "--temperature", "-1"], "--temperature"),
        (["--prompt", "hi", "--temperature", "nan"], "--temperature"),
        (["--prompt", "hi", "--top-p", "0"], "--top-p"),
        (["--prompt", "hi", "--top-p", "1.01"], "--top-p"),
        (["--prompt", "hi", "--top-p", "nan"], "--top-p"),
        (["--prompt", "hi", "--top-k", "-1"], "--top-k"),
        (["--prompt", "hi", "--stop", ""], "a stop string is empty"),
        (["--prompt", "hi", "--min-p", "1.5"], "--min-p"),
        (["--prompt", "hi", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["--prompt", "hi", "--min-tokens", "200"], "min_tokens = 200"),
        (["--prompt", "hi", "--logit-bias", "a=1"], "--logit-bias a=1"),
        (["--prompt", "hi", "--logit-bias", "3"], "--logit-bias 3: must be"),
        (["--prompt", "hi", "--logit-bias", "999=1"], "logit_bias = 1.0 of token 999"),
        (["--prompt", "hi", "--logprobs", "-1"], "num_logprobs = -1"),
        (["--prompt", "hi", "--regex", "("], "the regular expression cannot be used"),
        (["--prompt", "hi", "--regex", "a", "--json-object"], "three ways"),
        (["--prompt", "hi", "--json-schema", "@/no/schema"], "--json-schema @/no/schema"),
        (["--prompt", "hi", "--input", "x", "-o", "y"], "either --prompt or --input"),
        (["--prompt", "hi", "--resume"], "--resume goes with --input"),
        (["--input", "x"], "--input and --output go together"),
        (["--input", "/no/file", "-o", "/tmp/never"], "/no/file cannot be read"),
        (["--prompt", "hi", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["--prompt", "hi", "--device", "gpu"], "unknown device 'gpu'"),
        (["--prompt", "hi", "--plan", "/no/plan.toml"], "/no/plan.toml"),
        (["--prompt", "hi", "--set", "serve.policy=seriall"], "serve.policy"),
        (["--prompt", "hi", "--set", "serve.polcy=serial"], "serve.polcy"),
        (["--prompt", "hi", "--set", "serve.mesh.tp=2"], "serve.mesh.tp"),
    ],
    ids=str,
)
def test_mistakes(monkeypatch, capsys, arguments, message):
    found = inside(monkeypatch, capsys, "generate", MODEL, *arguments)
    assert_one_error(*found, 2, message)


def test_a_file_of_prompts(monkeypatch, capsys, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "hi", "id": "first"}, {"prompt": "x" * 600}, {"prompt": "ho", "seed": 8}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", MODEL, "--input", str(source), "-o", str(target), *FLOAT32]
    arguments += ["--max-tokens", "8", "--temperature", "1", "--json"]
    code, out, err = inside(monkeypatch, capsys, *arguments)
    assert code == 1
    counted = json.loads(out)
    assert counted == {"output": str(target), "lines": 3, "tokens": counted["tokens"], "refused": 1}
    assert "3/3" in err
    assert "1 lines could not be answered" in err
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["number"] for answer in answers] == [1, 2, 3]
    assert "the prompt has 600 tokens" in answers[1]["error"]
    alone = ["--prompt", "ho", "--seed", "8", "--max-tokens", "8", "--temperature", "1", "--json"]
    _, out, _ = inside(monkeypatch, capsys, "generate", MODEL, *alone, *FLOAT32)
    assert answers[2] == {"number": 3, **json.loads(out)}
    whole = target.read_bytes()
    code, out, err = inside(monkeypatch, capsys, *arguments)
    assert_one_error(code, out, err, 2, "exists already")
    target.write_bytes(whole[:-5])
    code, out, _ = inside(monkeypatch, capsys, *arguments, "--resume")
    assert (code, json.loads(out)["refused"]) == (0, 0)
    assert target.read_bytes() == whole


def test_every_flag_reaches_the_sampler(monkeypatch, capsys):
    base = ["generate", MODEL, "--prompt", "hi there", "--max-tokens", "12", "--json", *FLOAT32]

    def found(*flags):
        code, out, err = inside(monkeypatch, capsys, *base, *flags)
        assert code == 0, err
        return json.loads(out)

    plain = found()
    first = plain["token_ids"][0]
    assert found("--logit-bias", f"{first}=-100")["token_ids"][0] != first
    assert found("--presence-penalty", "50")["token_ids"] != plain["token_ids"]
    assert found("--frequency-penalty", "50")["token_ids"] != plain["token_ids"]
    assert found("--repetition-penalty", "50")["token_ids"] != plain["token_ids"]
    sampled = ["--temperature", "1.5", "--seed", "3"]
    assert found(*sampled, "--min-p", "1")["token_ids"] == plain["token_ids"]
    assert found(*sampled, "--top-k", "1")["token_ids"] == plain["token_ids"]
    assert found(*sampled)["token_ids"] != plain["token_ids"]
    told = found("--logprobs", "2")["logprobs"]
    assert [one["token_id"] for one in told] == plain["token_ids"]
    assert all(one["top"][0] == [one["token_id"], one["logprob"]] for one in told)
    assert found("--regex", "[xy]{4}")["text"].strip("xy") == ""
    assert found("--json-schema", '{"const": 17}')["text"] == "17"
    assert found("--stop-token-id", str(first))["token_ids"] == [first]
    assert len(found("--min-tokens", "12", "--ignore-eos")["token_ids"]) == 12


@pytest.mark.parametrize("model", ["[/bold]", "/no/[/such]/folder", "[red]", "x.gguf", ""])
def test_names_of_models_that_are_none(monkeypatch, capsys, model):
    found = inside(monkeypatch, capsys, "generate", model, "--prompt", "hi")
    assert_one_error(*found, 2, model)


def test_a_damaged_model_is_an_error_of_the_run(monkeypatch, capsys, tmp_path):
    from paceline.models.hub import resolve

    for name, text in resolve(MODEL).files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    found = inside(monkeypatch, capsys, "generate", str(tmp_path), "--prompt", "hi")
    assert_one_error(*found, 1, f"{tmp_path / 'model.safetensors'} is not a whole safetensors file")
    assert "hint: the file is truncated or damaged" in found[2]


def start():
    """A long answer in visible characters: greedy, this model says "222" for ever."""
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    options = ["--prompt", prompt, "--temperature", "0", "--max-tokens", "2000", *FLOAT32]
    command = [*PACELINE, "generate", "random:llama:small", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_control_c_ends_an_answer():
    with start() as process:
        assert process.stdout.read(1) == "2"  # it is answering
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert len(out) < 2000
    assert process.returncode == 130
    assert err.strip().endswith("error: interrupted")
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_crash():
    with start() as process:
        assert process.stdout.read(1) == "2"
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in err
