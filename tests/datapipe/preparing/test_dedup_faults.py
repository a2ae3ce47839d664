"""Deduplication that is killed, damaged or told nonsense goes on, or ends with one clear line."""

import itertools
import os
import signal
from pathlib import Path

import pytest

from crysforge.datapipe.common.journal import Journal, WorkDirectory
from crysforge.datapipe.preparing import deduplicate as unique
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.duplicates import decide
from crysforge.datapipe.preparing.duplicates.decide import Decide
from crysforge.datapipe.preparing.duplicates.matcher import Reduced
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from tests.duplicates import make_sets, polymorph, report, run, store


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


# -- Faults ----------------------------------------------------------------------------------------


def killed(work, call: int, monkeypatch, owner, name: str) -> None:
    """Runs `work` in a process that is killed at a call of `owner.name`."""
    pid = os.fork()
    if pid == 0:
        real, count = getattr(owner, name), itertools.count(1)

        def deadly(*args, **kwargs):
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, deadly)
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "name", "call", "again"),
    [
        (DatasetWriter, "finish", 1, 3),  # while parsing
        (Decide, "__call__", 1, 3),
        (Decide, "__call__", 3, 1),
        (DatasetWriter, "finish", 2, 0),  # before the data set is complete
    ],
)
def test_a_killed_run_goes_on(sets, tmp_path, monkeypatch, owner, name, call, again):
    output = tmp_path / "out"

    def work():
        return run(sets["new"], output, sets["known"], within=True)

    killed(work, call, monkeypatch, owner, name)
    assert not output.exists()
    decided = []
    real = Decide.__call__
    monkeypatch.setattr(
        Decide, "__call__", lambda self, task: (decided.append(task.key), real(self, task))[1]
    )
    work()
    assert len(decided) == again
    run(sets["new"], tmp_path / "whole", sets["known"], within=True)
    for file in ("matches.csv", "dropped.csv", "index.safetensors", "dedup.json"):
        assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_other_settings_do_not_go_on_with_old_decisions(sets, tmp_path, monkeypatch):
    output = tmp_path / "out"
    killed(lambda: run(sets["new"], output, sets["known"]), 3, monkeypatch, Decide, "__call__")
    strict = run(sets["new"], output, sets["known"], stol=0.001)
    assert strict == run(sets["new"], tmp_path / "fresh", sets["known"], stol=0.001)
    assert strict < sets["against"]


def test_a_torn_journal_keeps_its_whole_lines(tmp_path):
    log = Journal(tmp_path / "log")
    for i in range(3):
        log.add(f"key {i}", {"value": i})
    log.close()
    text = (tmp_path / "log").read_bytes()
    for length in range(len(text)):
        (tmp_path / "torn").write_bytes(text[:length])
        log = Journal(tmp_path / "torn")
        whole = text[:length].count(b"\n")
        assert log.done == {f"key {i}": {"value": i} for i in range(whole)}
        log.add("more", 1)
        log.close()
        again = Journal(tmp_path / "torn")
        again.close()
        assert again.done == log.done


def test_two_at_the_same_work(tmp_path):
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with WorkDirectory(tmp_path / "out", "dedup", {}):
            os.write(ready[1], b".")
            os.close(done[1])
            os.read(done[0], 1)
        os._exit(0)
    os.close(done[0])
    os.read(ready[0], 1)
    try:
        with (
            pytest.raises(ValueError, match="another process is writing"),
            WorkDirectory(tmp_path / "out", "dedup", {}),
        ):
            pass
    finally:
        os.close(done[1])
        os.waitpid(pid, 0)
    with WorkDirectory(tmp_path / "out", "dedup", {}) as work:
        work.remove()
    assert not work.path.exists()


def test_what_the_matcher_fails_on_is_kept_and_listed(sets, tmp_path, monkeypatch):
    bad = {min(sets["against"]), "known-3"}

    class Failing(Reduced):
        def __init__(self, crystal, item, most):
            if crystal.id in bad:
                raise ValueError("can't find niggli")
            super().__init__(crystal, item, most)

    monkeypatch.setattr(decide, "Reduced", Failing)
    found = run(sets["new"], tmp_path / "out", sets["known"])
    assert found <= sets["against"] - bad
    listed = report(tmp_path / "out")["undecided"]
    assert {(u["set"], u["id"]) for u in listed} == {
        ("known", "known-3"),
        ("the set itself", min(sets["against"])),
    }
    assert all("niggli" in u["why"] for u in listed)
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest.provenance["dedup"]["undecided"] == 2


def damage(root: Path) -> None:
    path = next(root.glob("train-*.tar"))
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def test_mistakes_are_one_clear_line(sets, tmp_path):
    known, new, out = sets["known"], sets["new"], tmp_path / "out"
    only_train = store(tmp_path / "only", train=[polymorph("rocksalt", 12, 8, "a")])
    broken = store(tmp_path / "broken", train=[polymorph("rocksalt", 12, 8, "a")])
    damage(tmp_path / "broken")
    with pytest.raises(ValueError, match="only has no crystals in test, only 1 train"):
        run(new, out, only_train, splits=["test"])
    with pytest.raises(ValueError, match="new is the input itself"):
        run(new, out, new)
    with pytest.raises(ValueError, match=r"broken: train-000000.tar entry 0 is damaged"):
        run(new, out, broken)
    with pytest.raises(ValueError, match="has no target 'hull'"):
        run(new, out, within=True, keep="lowest:hull")
    with pytest.raises(ValueError, match="does not exist"):
        run(new, out, str(tmp_path / "nothing"))
    (out).mkdir()
    (out / "file").touch()
    with pytest.raises(ValueError, match="already holds files"):
        run(new, out, known)
    for values in ({"keep": "best"}, {"keep": "lowest"}, {"splits": ["tests"]}, {"stol": 0}):
        with pytest.raises(ValueError, match=f"duplicates.{next(iter(values))}"):
            Duplicates(**values)


def test_dry_run_writes_nothing(sets, tmp_path):
    from crysforge.datapipe.preparing.write import plan

    config = PrepareConfig(
        input=sets["new"], output=str(tmp_path / "out"), dedup=[sets["known"]], progress=False
    )
    assert f"duplicates of {sets['known']}" in plan(config)
    assert not list(tmp_path.iterdir())


def test_names_of_references():
    assert unique._names(["a/x", "b/x/", "c/y.csv"]) == ["x (1)", "x (2)", "y.csv"]
