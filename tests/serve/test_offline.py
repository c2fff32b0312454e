"""Files of prompts: every line answered once and in order, however often the work is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from engines import TOKENIZER, real_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.errors import DataError, UsageError
from paceline.serve import offline
from paceline.serve.offline import answer_as_json, answer_file
from paceline.serve.options import Options
from paceline.serve.prompts_file import line_seed, read_lines

pytestmark = pytest.mark.cpu

LETTER = TOKENIZER.encode("A")[0]
OPTIONS = Options(max_tokens=6, temperature=1.0, seed=5)
LINES = [
    {"prompt": "one"},
    {"prompt": "two", "id": "b", "max_tokens": 2, "temperature": 0},
    {"messages": [{"role": "user", "content": "three"}], "seed": 9, "stop": ["a", "b"]},
    {"prompt": [1, 2, 3], "top_k": 5},
    {"prompt": "x" * 600},  # longer than the context
    {"prompt": "six", "id": 6, "logit_bias": {str(LETTER): 100}, "ignore_eos": True},
    {"prompt": ""},
    *({"prompt": f"number {number}"} for number in range(20)),
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source, target, *, resumes=False, options=OPTIONS, on_progress=lambda _: None):
    return answer_file(
        real_engine(), source, target, options, resumes=resumes, on_progress=on_progress
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The input, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("offline")
    source, target = write(folder / "in.jsonl", LINES), folder / "out.jsonl"
    progress = run(source, target)
    assert (progress.num_lines, progress.num_done, progress.num_refused) == (27, 27, 2)
    return source, target.read_bytes()


def test_every_line_is_answered_as_if_alone(done):
    source, whole = done
    answers = [json.loads(text) for text in whole.splitlines()]
    assert [answer["number"] for answer in answers] == list(range(1, 28))
    assert [answer.get("id") for answer in answers[:6]] == [None, "b", None, None, None, 6]
    engine = real_engine()
    for line, found in zip(read_lines(source, OPTIONS), answers, strict=True):
        if line.number in (5, 7):
            assert found["finish_reason"] == "error"
            assert "the prompt" in found["error"]
            continue
        ids = line.prompt_ids(TOKENIZER)
        (answer,) = engine.generate([line.options.request(ids)])
        expected = answer_as_json(answer, len(ids))
        named = {key: value for key, value in found.items() if key not in ("number", "id")}
        assert named.keys() == expected.keys()
        assert named["token_ids"] == expected["token_ids"]
        assert named["text"] == expected["text"]
        assert named["usage"]["prompt_tokens"] == len(ids)
    assert answers[5]["text"] == "A" * 6
    assert len(answers[1]["token_ids"]) <= 2


def test_log_probabilities_of_a_line(tmp_path):
    source, target = write(tmp_path / "in", [{"prompt": "one", "logprobs": 2}]), tmp_path / "out"
    run(source, target)
    found = json.loads(target.read_text())
    assert [one["token_id"] for one in found["logprobs"]] == found["token_ids"]
    assert all(len(one["top"]) == 2 for one in found["logprobs"])
    assert "prompt_logprobs" not in found


def test_seeds_follow_from_the_number():
    assert line_seed(5, 3) != line_seed(5, 4)
    assert line_seed(5, 3) != line_seed(6, 3)
    assert line_seed(5, 3) == line_seed(5, 3) < 2**63


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 10**6))
def test_it_goes_on_from_any_byte(done, cut):
    source, whole = done
    target = source.parent / "cut.jsonl"
    cut %= len(whole) + 1
    target.write_bytes(whole[:cut])
    starts = []
    run(source, target, resumes=True, on_progress=lambda p: starts.append(p.num_done))
    assert target.read_bytes() == whole
    assert starts == list(range(whole[:cut].count(b"\n"), 28))


def test_resume_of_nothing_is_a_beginning(done, tmp_path):
    source, whole = done
    run(source, tmp_path / "out.jsonl", resumes=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_window_bounds_what_is_in_flight(done, tmp_path, monkeypatch):
    source, whole = done
    monkeypatch.setattr(offline, "WINDOW", 3)
    engine, most = real_engine(), 0
    step = engine.step

    def counted():
        nonlocal most
        most = max(most, len(engine.book) + len(engine._arrived))
        step()

    engine.step = counted
    answer_file(engine, source, tmp_path / "o", OPTIONS, resumes=False, on_progress=lambda _: None)
    assert most == 3
    assert (tmp_path / "o").read_bytes() == whole


def test_what_is_there_is_not_written_over(done, tmp_path):
    source, whole = done
    target = tmp_path / "out.jsonl"
    target.write_bytes(whole)
    with pytest.raises(UsageError, match="exists already") as caught:
        run(source, target)
    assert "--resume" in caught.value.hint
    with pytest.raises(UsageError, match="more lines"):
        run(write(tmp_path / "short", LINES[:3]), target, resumes=True)
    other = write(tmp_path / "other", [{"number": 1}, {"number": 3}])
    with pytest.raises(DataError, match="other:2: not the answer to line 2"):
        run(source, other, resumes=True)
    foreign = tmp_path / "foreign"
    foreign.write_text("not an answer\n")
    with pytest.raises(DataError, match="foreign:1"):
        run(source, foreign, resumes=True)
    assert foreign.read_text() == "not an answer\n"
    with pytest.raises(UsageError, match="cannot be written"):
        run(source, tmp_path / "no" / "folder")


def test_two_processes_do_not_write_one_file(done, tmp_path):
    source, _ = done
    target = tmp_path / "out.jsonl"
    with offline._opened(target, True), pytest.raises(UsageError, match="another process"):
        run(source, target, resumes=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "temprature": 1}', "in:2: unknown key 'temprature'"),
        ('{"prompt": "x", "max_tokens": "1"}', 'in:2: max_tokens = "1": must be a whole number'),
        ('{"prompt": "x", "max_tokens": true}', "must be a whole number"),
        ('{"prompt": "x", "temperature": "hot"}', "must be a number"),
        ('{"prompt": "x", "stop": [1]}', "a text or a list of texts"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias"),
        ('{"prompt": "x", "regex": "a", "json_object": true}', "three ways"),
        ('{"prompt": "x", "messages": []}', "either"),
        ('{"max_tokens": 3}', "either"),
        ('{"prompt": 3}', "must be a text or a list of token ids"),
        ('{"messages": [{"role": "user"}]}', "must be a list of"),
        ("[1]", "a line is a JSON object"),
        ('{"prompt": "x"', "not JSON"),
        ("", "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, message):
    """They are told of before anything is done."""
    source, target = tmp_path / "in", tmp_path / "out"
    text = '{"prompt": "fine"}\n' + line + '\n{"prompt": "fine"}\n'
    source.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        run(source, target)
    assert message in str(caught.value)
    assert f"{source}:2: " in str(caught.value)
    assert not target.exists()


def test_a_key_like_another_is_hinted_at(tmp_path):
    with pytest.raises(DataError) as caught:
        list(read_lines(write(tmp_path / "in", [{"prompt": "x", "temprature": 1}]), OPTIONS))
    assert caught.value.hint == "did you mean temperature?"


def test_options_of_a_line_beat_those_of_the_job(tmp_path):
    line = {"prompt": "x", "stop": "s", "seed": 1, "json_schema": {"type": "null"}, "min_p": 0}
    source = write(tmp_path / "in", [line, {"prompt": "x"}])
    base = replace(OPTIONS, stop=("t",), min_p=0.5)
    first, second = (one.options for one in read_lines(source, base))
    assert (first.stop, first.seed, first.min_p) == (("s",), 1, 0.0)
    assert first.grammar.text == '{"type": "null"}'
    assert second == replace(base, seed=line_seed(5, 2))


@pytest.mark.ranks
@pytest.mark.slow
def test_kills_repeat_and_lose_no_line(tmp_path):
    """Killed again and again, at whatever point it is, and ended at last."""
    lines = [{"prompt": f"line {number}", "max_tokens": 8} for number in range(120)]
    source, target, whole = write(tmp_path / "in", lines), tmp_path / "out", tmp_path / "whole"
    command = [
        *(sys.executable, "-m", "paceline", "generate", "random:llama:tiny"),
        *("--input", str(source), "--temperature", "1", "--seed", "3", "--dtype", "float32"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "-o", str(whole)], check=True, **quiet)
    for most in (10, 50, 90):
        with subprocess.Popen([*command, "-o", str(target), "--resume"], **quiet) as process:
            end_s = time.monotonic() + 60
            while time.monotonic() < end_s and process.poll() is None:
                if target.exists() and target.read_bytes().count(b"\n") >= most:
                    break
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
    assert (
        subprocess.run([*command, "-o", str(target), "--resume"], check=False, **quiet).returncode
        == 0
    )
    assert target.read_bytes() == whole.read_bytes()
    assert target.read_bytes().count(b"\n") == 120
