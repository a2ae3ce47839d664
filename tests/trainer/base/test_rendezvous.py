"""The ranks of a job, as threads of this process: what they compare, and whom they hear of."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from crysforge.trainer.base import agreement, rendezvous, store
from crysforge.trainer.base.agreement import agree, same_file
from crysforge.trainer.base.distributed import place
from crysforge.trainer.base.rendezvous import LostRank, RankCrashed, RankFailed, join
from crysforge.trainer.base.store import Connection, Silent, span
from crysforge.trainer.jobs.schemas import pretrain_schema
from crysforge.trainer.runs.facts import LIBRARIES, MAY_DIFFER, flat, job_facts
from tests.distributed.ranks import ROOT, free_port


def environ(port: int, **more: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def at_once(*functions) -> list:
    """Calls each function in a thread of its own: what it returned or raised."""
    results: list = [None] * len(functions)

    def call(i: int) -> None:
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def meetings(size: int, timeout_s: float = 60) -> list[rendezvous.Rendezvous]:
    port = free_port()
    return [join(rank, size, timeout_s, environ(port)) for rank in range(size)]


@pytest.fixture(scope="module")
def five() -> list[rendezvous.Rendezvous]:
    return meetings(5)


def on_all(met, function) -> list:
    return at_once(*(lambda m=m: function(m) for m in met))


FACTS = {"vae.lr": 1e-3, "seed": 0, "torch": "2.13.0", "encoder.width": 256, "note": None}


def test_ranks_that_agree_go_on_and_send_no_more_than_a_hash(five, monkeypatch):
    sent = []

    class Counted:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            return getattr(self.store, name)

        def set(self, key, value):
            sent.append(value)
            self.store.set(key, value)

    for meeting in five:
        monkeypatch.setattr(meeting._main, "store", Counted(meeting.store))
    facts = {**FACTS, "long": "x" * 100_000}
    assert on_all(five, lambda m: agree(m, facts)) == [None] * 5
    assert len(sent) >= 5 and max(map(len, sent)) <= 64
    assert on_all(five, lambda m: m.share(m.rank + 7)) == [7] * 5
    assert agree(None, facts) is None


@pytest.mark.parametrize("others", [(1,), (0,), (2, 3, 4), (1, 3)])
@pytest.mark.parametrize("key", FACTS)
def test_ranks_that_differ_all_get_the_same_line(five, others, key):
    changed = {**FACTS, key: "another"}
    errors = on_all(five, lambda m: agree(m, changed if m.rank in others else FACTS))
    (line,) = {str(error) for error in errors}
    assert all(isinstance(error, ValueError) for error in errors)
    host = socket.gethostname()
    own = span([r for r in range(5) if r not in others])
    assert f"{json.dumps(FACTS[key])} on {own} ({host})" in line
    assert f'"another" on {span(others)} ({host})' in line
    assert f"disagree: {key}: " in line
    assert not any(f"{name}: " in line for name in FACTS.keys() - {key})


def test_many_differences_and_long_ones_are_one_readable_line(five):
    long = "a" * 5000

    def facts(rank: int) -> dict:
        return {"k0": long + str(rank), **{f"k{i}": rank for i in range(1, 9)}}

    (line,) = {str(error) for error in on_all(five, lambda m: agree(m, facts(m.rank)))}
    assert f'aaa0" on rank 0 ({socket.gethostname()})' in line and 'aaa2" on rank 2' in line
    assert "; and 5 more: start all of them" in line and len(line) < 1500
    only_here = on_all(five, lambda m: agree(m, {"a": 1} if m.rank else {}))
    assert "a: missing on rank 0" in str(only_here[0]) and "1 on ranks 1-4" in str(only_here[1])


def test_spans():
    assert span([3]) == "rank 3"
    assert span([0, 2, 3, 4, 7]) == "ranks 0, 2-4 and 7"
    assert span(range(0, 512, 2)).endswith("10, 12 and others, 256 in all")


@pytest.mark.parametrize(("code", "kind"), [(2, RankFailed), (1, RankCrashed)])
@pytest.mark.parametrize("who", [0, 1])
def test_who_waits_for_a_rank_that_fails_hears_why(who, code, kind):
    met = meetings(3)
    *others, failed = sorted(met, key=lambda m: m.rank == who)

    def wait(meeting):
        try:
            agree(meeting, FACTS)
        except (RankFailed, RankCrashed) as error:
            meeting.leave(wait=True)
            return error
        return None

    told = at_once(
        lambda: failed.tell("no data here", code), *(lambda m=m: wait(m) for m in others)
    )
    assert met[0].store.add("heard", 0) == 3  # so nobody waits any longer
    assert [type(x) for x in told[1:]] == [kind] * 2
    assert {str(x) for x in told[1:]} == {f"{failed.name}: no data here"}


def test_who_comes_late_hears_it_as_well_and_the_first_reason_counts():
    port = free_port()

    def first():
        join(0, 3, 60, environ(port)).tell("the reason", 2)

    def second():
        meeting = join(1, 3, 60, environ(port))
        while meeting._news is None:
            meeting._look(meeting._main)
        meeting.tell("what came of it", 1)

    def late():
        meeting = join(2, 3, 60, environ(port))
        try:
            meeting.share()
        finally:
            meeting.leave(wait=False)

    error = at_once(first, second, late)[2]
    assert isinstance(error, RankFailed) and str(error).endswith("the reason")


def test_a_rank_that_never_comes_is_named():
    met = meetings(4, timeout_s=0.5)
    errors = at_once(*(lambda m=m: agree(m, FACTS) for m in met if m.rank not in (1, 2)))
    assert "waited 0.5 s (trainer.timeout_s) for ranks 1-2, which did not answer" in str(errors[0])
    assert isinstance(errors[0], TimeoutError)
    assert "waited 0.5 s (trainer.timeout_s) for rank 0, which did not answer" in str(errors[1])


def test_whoever_is_not_of_the_job_is_sent_away_and_disturbs_nobody():
    port, slurm = free_port(), {"SLURM_JOB_ID": "7"}
    zero = join(0, 2, 60, environ(port, **slurm))
    for (rank, size), more, kind, words in (
        ((1, 3), {}, ValueError, "one of 3 ranks, rank 0 on .* as one of 2"),
        ((1, 2), {"SLURM_JOB_ID": "8"}, ConnectionError, r"another job \(7, this one is 8\): set"),
        ((0, 2), slurm, ConnectionError, f"port {port} of .* is taken.* set MASTER_PORT"),
    ):
        with pytest.raises(kind, match=words):
            join(rank, size, 60, environ(port, **more))
    one = join(1, 2, 60, environ(port, **slurm))
    with pytest.raises(ValueError, match=r"another process at .* is rank 1, too"):
        join(1, 2, 60, environ(port))
    assert on_all([zero, one], lambda m: agree(m, FACTS)) == [None, None]


def test_what_is_wrong_with_the_way_to_rank_0_is_one_line(monkeypatch):
    monkeypatch.setattr(store, "ANSWER_S", 0.3)
    for given, words in (
        ({}, "no MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x1"}, "MASTER_PORT=x1 is no port"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"MASTER_ADDR": "no.such.invalid", "MASTER_PORT": "1"},
         r"MASTER_ADDR=no\.such\.invalid is no host .*: set MASTER_ADDR"),
        ({"MASTER_ADDR": "n" * 64, "MASTER_PORT": "1"}, "MASTER_ADDR=nn.* is no host"),
    ):  # fmt: skip
        for rank in (0, 1):
            with pytest.raises((ValueError, ConnectionError), match=words):
                join(rank, 2, 0.2, given)
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"nobody at 127.0.0.1:{port} within 0\.3 s \(trainer"):
        join(1, 2, 0.3, environ(port))
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"port {port} of .* is taken.*set MASTER_PORT"):
            join(0, 2, 60, environ(port))
        with pytest.raises(ConnectionError, match=r"is not rank 0 of this job.*: set MASTER_PORT"):
            join(1, 2, 60, environ(port))


def test_a_store_that_falls_silent_is_a_lost_rank():
    """As of a frozen host: torch itself waits for ever."""
    (zero,) = meetings(1)
    frozen = threading.Event()
    connection = Connection(zero.store)
    assert connection.ask(lambda s: s.add("x", 2), 60) == 2
    for _ in range(2):  # and later questions do not wait again
        with pytest.raises(Silent):
            connection.ask(lambda s: frozen.wait(), 0.05)
    zero.timeout_s, zero._main.store = 0.05, SimpleNamespace(check=lambda keys: frozen.wait())
    with pytest.raises(LostRank, match="rank 0 lost the other ranks"):
        zero.check()
    frozen.set()


def test_a_file_is_waited_for_until_all_see_what_rank_0_wrote(five, tmp_path, monkeypatch):
    paths = [tmp_path / str(rank) for rank in range(5)]
    for path in paths:
        path.write_text("old" if path == paths[1] else "new")

    def look(path, look=agreement._digest):
        found = look(path)
        if path == paths[1]:
            path.write_text("new")
        return found

    looks = [lambda m=m: same_file(m, paths[m.rank]) for m in five]
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "_digest", look)
        assert at_once(*looks) == [None] * 5
    paths[1].unlink()
    monkeypatch.setattr(agreement, "LAG_S", 0.1)
    assert "file system that all hosts share" in str(at_once(*looks)[1])


def test_a_place_among_ranks_is_one_of_them():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4"}
    srun = {"SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1"}
    assert place(torchrun) == (1, 4, 0)
    assert place(torchrun | srun | {"LOCAL_RANK": "1"}) == (1, 4, 1)
    assert place(srun) == (2, 3, 1)
    assert place(srun | {"SLURM_STEP_NUM_TASKS": "6"}) == (2, 6, 1)
    del srun["SLURM_STEP_ID"]  # a batch script
    assert place(srun) == place({}) == (0, 1, 0)
    for wrong, words in (
        ({"RANK": "4"}, "RANK=4, but WORLD_SIZE=4: ranks go from 0 to 3"),
        ({"RANK": "-1"}, "RANK=-1 is no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
    ):
        with pytest.raises(ValueError, match=words):
            place(torchrun | wrong)


def test_every_setting_is_compared_but_those_that_may_differ():
    config = pretrain_schema()()
    settings = flat(dataclasses.asdict(config))
    assert settings.keys() >= MAY_DIFFER
    manifest = SimpleNamespace(fingerprint="f", index_sha256="i")
    facts = job_facts(config, manifest)
    assert settings.keys() & facts.keys() == settings.keys() - MAY_DIFFER | {"init_from"}
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    config.vae.lr, config.loader.workers, manifest.fingerprint = 7.0, 9, "other"
    changed = job_facts(config, manifest)
    assert {k for k in facts if facts[k] != changed[k]} == {"vae.lr", "the data's fingerprint"}
    known = (ROOT / "setup.cfg").read_text()
    assert all(f"    {name}>" in known for name in LIBRARIES)
