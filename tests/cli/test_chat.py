"""``paceline chat``, its lines through a pipe."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time

import pytest

from paceline.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

COMMAND = [sys.executable, "-m", "paceline", "chat", "random:llama:tiny"]
SAMPLING = ["--seed", "4", "--max-tokens", "12", "--dtype", "float32"]


def chat(*lines):
    done = subprocess.run(
        [*COMMAND, *SAMPLING],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        errors="replace",
    )
    assert "Traceback" not in done.stderr
    return done


def answers(done):
    """What the model said, from the prompt to the line of its speed."""
    parts = re.split(r"you  ", done.stdout)[1:]
    return [part.rsplit("\n", 2)[0] for part in parts if "tokens/s" in part]


@pytest.fixture(scope="module")
def conversation():
    return chat(
        *("hi", "again", "/reset", "hi", "/system be brief", "hi", "/reset", "hi"),
        *("/help", "/nope", "/[/red] x", "", "x" * 600, "/exit", "never read"),
    )


def test_a_conversation(conversation):
    assert conversation.returncode == 0
    first, second, after_reset, with_system, again = answers(conversation)
    assert first == after_reset == again  # /reset forgets, and a seed repeats
    assert len({first, second, with_system}) == 3  # what was said before matters


def test_commands(conversation):
    out = conversation.stdout
    assert "/system TEXT starts anew" in out
    assert "no command /nope; /help lists them" in out
    assert "no command /[/red]; /help lists them" in out


def test_a_question_that_is_refused_leaves_the_conversation_alive(conversation):
    assert "the prompt has 6" in conversation.stdout
    assert conversation.stdout.count("tokens/s") == 5


def test_the_end_of_input_leaves(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paceline", *COMMAND[3:], *SAMPLING])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert capsys.readouterr().out.count("tokens/s") == 1


def test_control_c_ends_an_answer_and_then_the_chat():
    arguments = ["--temperature", "0", "--max-tokens", "1500", "--dtype", "float32"]
    command = [*COMMAND[:-1], "random:llama:small", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        seen = b""
        while b"you  " not in seen or not seen.split(b"you  ")[1]:
            seen += process.stdout.read1()
        process.send_signal(signal.SIGINT)  # ends the answer
        while b"tokens/s" not in seen:
            seen += process.stdout.read1()
        assert seen.count(b"you  ") <= 2
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)  # leaves
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Traceback" not in out + err
