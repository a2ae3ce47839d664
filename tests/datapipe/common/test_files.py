"""Files are whole or absent, whoever else writes, and whatever lies in their place."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from crysforge.datapipe.common import files
from crysforge.datapipe.common.files import (
    make_directory,
    new_directory,
    open_append,
    read_json_lines,
    replacing,
    replacing_by_name,
    replacing_directory,
    sha256,
    write_bytes,
    write_json,
    write_text,
)
from crysforge.trainer.base.tensors import save_tensors
from crysforge.trainer.figures.style import new_figure, save_png
from crysforge.trainer.jobs.tables import write_table
from tests.families import left_of, parent_of, until

FORK = multiprocessing.get_context("fork")
MINE = "my thesis"


def by_name(path):
    with replacing_by_name(path) as temporary:
        temporary.write_text("new")


def appended(path):
    with open_append(path) as file:
        file.write("new")


WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "bytes": lambda path: write_bytes(path, b"new"),
    "json": lambda path: write_json(path, "new", durable=False),
    "tensors": lambda path: save_tensors(path, {"x": torch.zeros(2)}),
    "table": lambda path: write_table(path, ["a"], {}),
    "figure": lambda path: save_png(new_figure(1, 1), path),
    "by name": by_name,
    "append": appended,
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS)
def write(request):
    return request.param


# What lies in the place


def link(path, victim):
    path.symlink_to(victim)


def dangling(path, victim):
    path.symlink_to(victim.with_name("not there"))


def pipe(path, victim):
    os.mkfifo(path)


def unix_socket(path, victim):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def device(path, victim):
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("put", [link, dangling, pipe, unix_socket, device, "directory"])
def test_only_files_are_replaced(tmp_path, write, put):
    victim, path = tmp_path / "victim", tmp_path / "out"
    victim.write_text(MINE)
    path.mkdir() if put == "directory" else put(path, victim)
    before = path.lstat()
    with pytest.raises(OSError, match=r"out is a .* and is not replaced: remove it"):
        write(path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert victim.read_text() == MINE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "victim"]


def test_no_link_that_is_put_beside_leads_it_away(tmp_path, write):
    """Temporaries of earlier versions had a name that anybody could know."""
    victim, path = tmp_path / "victim", tmp_path / "out"
    victim.write_text(MINE)
    for name in (".out.tmp", ".out.00000000.tmp", ".out.partial"):
        (tmp_path / name).symlink_to(victim)
    write(path)
    assert path.is_file() and not path.is_symlink()
    assert victim.read_text() == MINE


def test_directories_are_no_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text(MINE)
    for name, what in (("link", "a symbolic link"), ("file", "File exists")):
        with pytest.raises(OSError, match=what):
            make_directory(tmp_path / name)
    make_directory(tmp_path / "link" / "below")  # where the user has put all of it
    make_directory(tmp_path / "link" / "below")
    assert (tmp_path / "elsewhere" / "below").is_dir()


# Modes and names


def test_others_may_do_what_the_umask_lets_them(tmp_path, write):
    for mask in (0o022, 0o077, 0o002):
        kept = os.umask(mask)
        try:
            (tmp_path / f"other-{mask}").touch()
            write(tmp_path / f"out-{mask}")
        finally:
            os.umask(kept)
        modes = [(tmp_path / f"{name}-{mask}").stat().st_mode for name in ("other", "out")]
        assert modes[0] == modes[1]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "a.b.c", "-", " "])
def test_any_name(tmp_path, name):
    for _ in range(2):
        write_text(tmp_path / name, "new")
        by_name(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


# Failures, kills, and others who write the same


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "out"
    write_text(path, "old")
    for fill in (replacing, replacing_by_name):
        with pytest.raises(ZeroDivisionError), fill(path):
            raise ZeroDivisionError
    for fill in (new_directory, replacing_directory):
        with pytest.raises(ZeroDivisionError), fill(tmp_path / "folder") as work:
            write_text(work / "x", "new")
            raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FILLS = [replacing, replacing_by_name, new_directory, replacing_directory]


@pytest.mark.parametrize("fill", FILLS)
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, fill):
    def begin(folder):
        def work():
            with fill(folder / "out") as place:
                if isinstance(place, Path):  # a directory, or a file to be made
                    (place if place.is_dir() else place.parent).joinpath("x").write_text("half")
                (folder.parent / f"{folder.name} has begun").touch()
                signal.pause()

        folder.mkdir()
        return work

    def again(folder):
        with fill(folder / "out") as place:
            if fill is replacing_by_name:
                place.write_text("new")

    with parent_of(begin(tmp_path / "killed")) as process:
        until((tmp_path / "killed has begun").exists, "it writes")
        process.kill()
        left_of([process])
    with parent_of(begin(tmp_path / "living")):
        until((tmp_path / "living has begun").exists, "it writes")
        for name in ("killed", "living"):
            assert len(list((tmp_path / name).iterdir())) == 1
            again(tmp_path / name)
        assert [p.name for p in (tmp_path / "killed").iterdir()] == ["out"]
        assert len(list((tmp_path / "living").iterdir())) == 2


def test_many_who_write_the_same_do_not_disturb_each_other(tmp_path):
    contents = [f"{i}" * 100_000 for i in range(4)]

    def work(content, results):
        try:
            for _ in range(25):
                write_text(tmp_path / "out", content, durable=False)
                assert (tmp_path / "out").read_text() in contents
            results.put("written")
        except BaseException as error:
            results.put(repr(error))

    results = FORK.Queue()
    processes = [FORK.Process(target=work, args=(c, results)) for c in contents]
    for process in processes:
        process.start()
    assert [results.get(timeout=100) for _ in processes] == ["written"] * 4
    for process in processes:
        process.join()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_of_two_new_directories_one_appears(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "out") as late:
        write_text(late / "x", "late")
        with new_directory(tmp_path / "out") as early:
            write_text(early / "x", "early")
    with pytest.raises(ValueError, match="exists: choose another output"):
        new_directory(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "x").read_text() == "early"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_takes_the_place_of_another_where_a_link_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    with replacing_directory(tmp_path / "link") as work:
        write_text(work / "new", "")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


# Pipes and terminals


def test_what_goes_to_a_pipe_goes_on(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    with replacing(tmp_path / "pipe", streams=True) as file:
        file.write("a line\n")
    reader.join(60)
    assert found == ["a line\n"]
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_on_and_not_replaced(tmp_path, name):
    """Nor cut off, where it is a file that others have written to."""
    code = "import sys; from datapipe.common.files import replacing\n"
    code += "with replacing(sys.argv[1], streams=True) as file: file.write('more')"
    out = tmp_path / "out"
    out.write_text("some ")
    with open(out, "a") as stdout:
        subprocess.run([sys.executable, "-c", code, name], stdout=stdout, check=True)
    assert out.read_text() == "some more"


# Reading


def test_lines_of_json_without_what_a_kill_has_cut_off(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n[2]\nnonsense\n\xff\n{"a": "\xe2\x80\xa8"}\n{"a": 3}\n{"a": ')
    assert [value for _, value in read_json_lines(path)] == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]
    assert next(line for line, _ in read_json_lines(path)) == '{"a": 1}'
    assert [value for _, value in read_json_lines(path, last=20)] == [{"a": 3}]


def test_hashes_are_those_of_everybody(tmp_path):
    (tmp_path / "folder" / "b").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_bytes(b"x" * 3_000_000)
    (tmp_path / "folder" / "b" / "c.txt").write_bytes(b"")
    hashes = [hashlib.sha256(data).hexdigest() for data in (b"x" * 3_000_000, b"")]
    assert sha256(tmp_path / "folder" / "a.txt") == hashes[0]
    listed = f"{hashes[0]}  a.txt\n{hashes[1]}  b/c.txt\n"
    assert sha256(tmp_path / "folder") == hashlib.sha256(listed.encode()).hexdigest()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
        write_text(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []
