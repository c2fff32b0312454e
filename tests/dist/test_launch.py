from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from paceline.dist import launch

pytestmark = pytest.mark.ranks

# A parent whose child says its number once it is set up; it waits for as long as it is told.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(float(sys.argv[2]))
"""
PLAIN_CHILD = """
import os, time
print(os.getpid(), flush=True)
time.sleep(60)
"""
WATCHING_CHILD = "from paceline.dist.launch import end_with_parent; end_with_parent()" + PLAIN_CHILD


def test_a_watching_child_ends_with_its_killed_parent(start_python, is_running, ends_within):
    children = []
    for program in (PLAIN_CHILD, WATCHING_CHILD):
        parent = start_python(PARENT, program, "60")
        children.append(int(parent.stdout.readline()))
        parent.kill()
    plain, watching = children
    assert ends_within(watching, 10)
    assert is_running(plain)  # so it was the watch that has ended the other


def test_a_watching_child_lives_while_its_parent_does(start_python, ends_within):
    parent = start_python(PARENT, WATCHING_CHILD, "2.5")
    child = int(parent.stdout.readline())
    assert not ends_within(child, 1.2)
    parent.wait()
    assert ends_within(child, 10)


def test_a_rank_whose_launcher_is_gone_already_ends(start_python, ends_within):
    program = "from paceline.dist.launch import follow_launcher\nfollow_launcher(999999999)\n"
    orphan = start_python(program + PLAIN_CHILD)
    assert ends_within(orphan.pid, 10)
    assert orphan.wait() == 1


def test_a_rank_watches_once(start_python):
    program = "import threading\nfrom paceline.dist.launch import follow_launcher\n"
    program += "follow_launcher(); follow_launcher(); print(threading.active_count())"
    assert start_python(program).stdout.read() == "2\n"  # the main thread, and one that watches


def test_a_rank_is_told_by_its_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launch.is_launched()
    monkeypatch.setenv("RANK", "1")
    assert not launch.is_launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.is_launched()


def test_an_interrupt_ends_a_rank_without_a_word():
    program = "import os, signal; from paceline.dist.launch import follow_launcher\n"
    program += "follow_launcher(); os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
