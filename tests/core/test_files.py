from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys

import pytest

from paceline.core import files

# Makes the file or folder argv[1], killing itself at the argv[2]-th sync (0: in the body).
MAKE = """
import os, pathlib, signal, sys
from paceline.core import files

path, kill_at = pathlib.Path(sys.argv[2]), int(sys.argv[3])
real_fsync, num_syncs = os.fsync, 0

def fsync(handle):
    global num_syncs
    num_syncs += 1
    if num_syncs == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    real_fsync(handle)

os.fsync = fsync
with getattr(files, sys.argv[1])(path) as temporary:
    target = temporary / "sub" if sys.argv[1] == "new_folder" else temporary
    if target != temporary:
        target.mkdir()
        target = target / "part"
    target.write_text("half")
    if kill_at == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    target.write_text("whole")
print(num_syncs)
"""


def make(kind, path, kill_at):
    command = [sys.executable, "-c", MAKE, kind, str(path), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["new_file", "new_folder"])
def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path, kind):
    whole = make(kind, tmp_path / "whole", kill_at=10**9)
    assert whole.returncode == 0, whole.stderr
    num_syncs = int(whole.stdout)
    assert num_syncs >= 2  # the content, and the name in its folder
    seen = []
    for kill_at in range(num_syncs + 1):
        path = tmp_path / f"killed-{kill_at}"
        assert make(kind, path, kill_at).returncode == -signal.SIGKILL
        content = path / "sub" / "part" if kind == "new_folder" else path
        seen.append(content.read_text() if path.exists() else "nothing")
    # Only the last sync, that of the parent folder, comes after the rename.
    assert seen == ["nothing"] * num_syncs + ["whole"]


@pytest.mark.parametrize("kill_at", [0, 1])
def test_a_kill_leaves_the_old_file(tmp_path, kill_at):
    path = tmp_path / "file"
    path.write_text("old")
    assert make("new_file", path, kill_at).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def break_off(making, part=""):
    with making as temporary:
        (temporary / part).write_text("half")
        raise KeyError


def test_a_raising_body_leaves_nothing_new(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(KeyError):
        break_off(files.new_file(path))
    with pytest.raises(KeyError):
        break_off(files.new_folder(tmp_path / "folder"), "part")
    assert list(tmp_path.iterdir()) == []

    path.write_text("old")
    with pytest.raises(KeyError):
        break_off(files.new_file(path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def test_a_file_appears_whole_under_its_name_alone(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"new", b"newer"):
        with files.new_file(path) as temporary:
            temporary.write_bytes(content)
            assert temporary.parent == path.parent  # a rename must not cross file systems
            assert temporary.name.startswith(".file.")  # out of the way of `*`
            assert not path.exists() or path.read_bytes() == b"new"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_under_its_name_alone(tmp_path):
    path = tmp_path / "a" / "b" / "folder"
    with files.new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "part").write_text("whole")
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".folder.")
        assert not path.exists()
    assert (path / "sub" / "part").read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_first_of_two_folders_stays(tmp_path):
    path = tmp_path / "folder"
    with files.new_folder(path) as second:
        (second / "who").write_text("second")
        with files.new_folder(path) as first:
            (first / "who").write_text("first")
    assert (path / "who").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path):
    path = tmp_path / "name"
    path.write_text("file")
    with pytest.raises(OSError, match="name"), files.new_folder(path):
        pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("name", "file")]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_modes_are_what_open_and_mkdir_would_give(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.new_folder(tmp_path / "folder") as temporary:
            (temporary / "sub").mkdir(mode=0o700)
            files.write_text(temporary / "sub" / "part", "")
            (temporary / "sub" / "part").chmod(0o600)  # as some writers leave theirs
        files.write_text(tmp_path / "file", "")
        assert os.umask(umask) == umask  # and the mask itself is as it was
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path


def test_all_content_is_on_disk_before_the_name_appears(monkeypatch, tmp_path):
    synced = []  # inode, and whether the final name was there already
    real_fsync = os.fsync

    def fsync(handle):
        synced.append((os.fstat(handle).st_ino, path.exists()))
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    path = tmp_path / "file"
    files.write_text(path, "\u00e9")
    assert path.read_bytes() == b"\xc3\xa9"
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]

    synced.clear()
    path = tmp_path / "folder"
    with files.new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "part").write_text("text")
    inside = {p.stat().st_ino for p in (path, path / "sub", path / "sub" / "part")}
    assert {inode for inode, is_named in synced if not is_named} == inside
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_sha256_reads_all_and_tells_how_far_it_is(tmp_path):
    content = bytes(range(256)) * (9 << 12)  # 9 MiB: three chunks, the last a short one
    (tmp_path / "file").write_bytes(content)
    told = []
    digest = files.sha256(tmp_path / "file", told.append)
    assert digest == hashlib.sha256(content).hexdigest() == files.sha256(tmp_path / "file")
    assert sum(told) == len(content)
    assert len(told) > 1


LOCK = """
import os, pathlib, signal, sys, time
from paceline.core.files import locked

path = pathlib.Path(sys.argv[1])
for _ in range(5):
    with locked(path):
        with path.with_name("log").open("a") as log:
            log.write(f"begin {sys.argv[2]}\\n")
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        with path.with_name("log").open("a") as log:
            log.write(f"end {sys.argv[2]}\\n")
"""


def test_a_lock_is_held_by_one_process_at_a_time_and_ends_with_it(tmp_path):
    path = tmp_path / "cache" / "store"
    killed = subprocess.run([sys.executable, "-c", LOCK, str(path), "killed"], check=False)
    assert killed.returncode == -signal.SIGKILL
    started = [
        subprocess.Popen([sys.executable, "-c", LOCK, str(path), str(number)])
        for number in range(4)
    ]
    assert [process.wait(timeout=30) for process in started] == [0] * 4
    _, *lines = (path.parent / "log").read_text().splitlines()
    assert len(lines) == 4 * 2 * 5
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert begin.replace("begin", "end") == end
    assert [file.name for file in path.parent.iterdir()] == ["log"]
