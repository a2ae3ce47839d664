"""Where the ranks of a job meet before any collective, and hear of each other until they end.

The ranks compare through rank 0's store what they are about to do, before a process group is built
from it. A rank that fails says there why; a thread of every other one looks once a second, so that
all end with that reason, whatever they wait in.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from crysforge.datapipe.common.safe_read import parse_json
from crysforge.trainer.base.store import (
    OWN_PORT,
    Connection,
    Silent,
    address,
    first_line,
    host_store,
    reach_store,
    resolve,
    span,
)

LOOK_S = 1.0
"""Seconds between two looks at whether a rank has failed."""
GRACE_S = 20.0
"""Most seconds that a rank which fails waits for the others to hear of it."""
MAIN_S = 10.0
"""Seconds that the main thread of a rank has to end by itself once another one has failed."""
_FAILED, _HEARD, _JOB = "failed", "heard", "job"


class LostRank(ConnectionError):
    """Another rank, or the way to it, is gone; the same command may go on."""

    def __init__(self, rank: int, reason: object) -> None:
        super().__init__(
            f"rank {rank} lost the other ranks, whose output may tell why; the same command "
            f"continues from the newest checkpoint ({reason})"
        )


class RankCrashed(ConnectionError):
    """Another rank has ended for the reason in the message, which may not come again."""


class RankFailed(ValueError):
    """Another rank has ended for the reason in the message, which someone must mend."""


class Rendezvous:
    """One rank's part in the meeting; `join` makes it. All ranks call `gather` and `share` in the
    same order.

    Args:
        store: for the main thread, and for process groups.
        watched: another connection to it, for the thread that looks after failures.
        timeout_s: longest wait for another rank.
        hosts: whether this process holds the store.
    """

    def __init__(
        self,
        store: dist.Store,
        watched: dist.Store,
        rank: int,
        size: int,
        timeout_s: float,
        hosts: bool,
    ) -> None:
        self.store, self._main, self._watched = store, Connection(store), Connection(watched)
        self.rank, self.size, self.timeout_s, self.hosts = rank, size, timeout_s, hosts
        self.name = f"rank {rank} on {socket.gethostname()}"
        self._calls, self._grace = 0, min(GRACE_S, timeout_s)
        self._news: Exception | None = None
        self._arrived, self._over = threading.Event(), threading.Event()
        self._heard = False
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Begins to look after failures of other ranks."""
        threading.Thread(target=self._watch, name="rendezvous", daemon=True).start()

    def gather(self, value: str, ranks: Sequence[int]) -> list[str]:
        """What `ranks` give, on rank 0; the others do not wait and get nothing.

        Raises:
            LostRank, RankCrashed, RankFailed: a rank has failed, or rank 0 is gone.
            TimeoutError: a rank has not come.
        """
        key = self._next()
        if self.rank in ranks:
            self._ask(lambda store: store.set(f"{key}/{self.rank}", value))
            if self._ask(lambda store: store.add(f"{key}/count", 1)) == len(ranks):
                self._ask(lambda store: store.set(f"{key}/whole", ""))
        if self.rank:
            return []
        places = {rank: f"{key}/{rank}" for rank in ranks}
        self._await(f"{key}/whole", places)
        found = self._ask(lambda store: store.multi_get(list(places.values())))
        return [text.decode() for text in found]

    def share(self, value: Any = None) -> Any:
        """Rank 0's value (JSON), on every rank. Raises as `gather`."""
        key, text = self._next(), json.dumps(value)
        if self.rank == 0:
            self._ask(lambda store: store.set(key, text))
            return parse_json(text, key)
        return parse_json(self._await(key, {0: key}), key)

    def check(self) -> None:
        """Raises LostRank, RankCrashed or RankFailed if a rank has failed, or rank 0 is gone."""
        if self._news is None:
            self._look(self._main)
        if self._news is not None:
            raise self._news

    def news(self) -> Exception | None:
        """Why another rank has failed, if it says so before long."""
        self._arrived.wait(2 * LOOK_S)
        return self._news

    def tell(self, reason: str, code: int) -> None:
        """Says why this rank ends, unless another one was first, and leaves.

        Args:
            code: exit code; 2 if someone must mend something.
        """
        text = json.dumps({"rank": self.name, "reason": reason, "code": code})
        with contextlib.suppress(dist.DistError, Silent):
            self._main.ask(lambda store: store.compare_set(_FAILED, "", text), self._grace)
        self.leave(wait=True)

    def leave(self, wait: bool) -> None:
        """Ends the watch; `wait` until all ranks leave or know why to, for a while at most."""
        self.close()
        self._acknowledge(self._main)
        if wait:
            self._await_others(self._main)

    def close(self) -> None:
        """Ends the watch, and asks nothing of the others."""
        self._over.set()

    def _next(self) -> str:
        self._calls += 1
        return f"call-{self._calls}"

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        try:
            return self._main.ask(question, self.timeout_s)
        except (dist.DistError, Silent) as error:
            self._take(LostRank(self.rank, first_line(error)))
            assert self._news is not None
            raise self._news from None

    def _await(self, key: str, places: Mapping[int, str]) -> bytes:
        """A value, as soon as it is there; `places` are the keys that ranks have to set for it."""
        end, pause = time.monotonic() + self.timeout_s, 0.005
        while not self._ask(lambda store: store.check([key])):
            self.check()
            if time.monotonic() > end:
                late = self._ask(
                    lambda store: [rank for rank, at in places.items() if not store.check([at])]
                )
                raise TimeoutError(
                    f"{self.name} waited {self.timeout_s:g} s (trainer.timeout_s) for "
                    f"{span(late)}, which did not answer: their output may say why"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return self._ask(lambda store: store.get(key))

    def _look(self, connection: Connection) -> None:
        """Takes the news, if there are any."""

        def question(store: dist.Store) -> bytes:
            return store.get(_FAILED) if store.check([_FAILED]) else b""

        try:
            found = connection.ask(question, self.timeout_s)
        except (dist.DistError, Silent) as error:
            self._take(LostRank(self.rank, first_line(error)))
            return
        if found:
            values = parse_json(found, _FAILED)
            kind = RankFailed if values["code"] == 2 else RankCrashed
            self._take(kind(f"{values['rank']}: {values['reason']}"))
            self._acknowledge(connection)

    def _take(self, news: Exception) -> None:
        self._news = self._news or news
        self._arrived.set()

    def _acknowledge(self, connection: Connection) -> None:
        with self._lock:
            heard, self._heard = self._heard, True
        if not heard:
            with contextlib.suppress(dist.DistError, Silent):
                connection.ask(lambda store: store.add(_HEARD, 1), self._grace)

    def _await_others(self, connection: Connection) -> None:
        end = time.monotonic() + self._grace
        with contextlib.suppress(dist.DistError, Silent):
            while connection.ask(lambda store: store.add(_HEARD, 0), self._grace) < self.size:
                if time.monotonic() > end:
                    return
                time.sleep(0.02)

    def _watch(self) -> None:
        while self._news is None:
            if self._over.wait(LOOK_S):
                return
            self._look(self._watched)
        if not self._over.wait(MAIN_S):
            self._end()

    def _end(self) -> None:
        """Ends the process, whatever its main thread waits in; what a thread writes is finished."""
        print(f"error: {self._news}", file=sys.stderr, flush=True)
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join(self.timeout_s)
        if self.hosts:
            self._await_others(self._watched)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(2 if isinstance(self._news, RankFailed) else 1)


def join(
    rank: int, size: int, timeout_s: float, environ: Mapping[str, str] = os.environ
) -> Rendezvous:
    """Meets the other ranks of the job.

    Args:
        timeout_s: longest wait for rank 0, now, and for any rank, later.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is wrong, or rank 0 does not wait for this process.
        ConnectionError: the port is not this job's.
        TimeoutError: rank 0 did not come.
    """
    end = time.monotonic() + timeout_s
    host, port = address(environ)
    resolve(host, end)
    torchrun = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it holds the store itself
    hosts = rank == 0 and not torchrun
    client = host_store(host, port) if hosts else reach_store(host, port, timeout_s, end)
    wait = timedelta(seconds=timeout_s)
    second = dist.TCPStore(client.host, client.port, None, False, wait, wait_for_workers=False)
    client.set_timeout(wait)
    attempt = f"crysforge-{environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store, watched = (dist.PrefixStore(attempt, c) for c in (client, second))
    meeting = Rendezvous(store, watched, rank, size, timeout_s, hosts)
    job = environ.get("SLURM_HET_JOB_ID") or environ.get("SLURM_JOB_ID") or ""
    _introduce(meeting, job, f"{host}:{port}", max(1.0, end - time.monotonic()))
    return meeting


def _introduce(meeting: Rendezvous, job: str, where: str, seconds: float) -> None:
    """Takes this rank's place. Raises ValueError if there is none for it."""
    rank, store = meeting.rank, meeting.store
    own = {"job": job, "size": meeting.size, "name": meeting.name}
    try:
        if rank == 0:
            store.set(_JOB, json.dumps(own))
        store.wait([_JOB], timedelta(seconds=seconds))
        first = parse_json(store.get(_JOB), _JOB)
        if job and first["job"] and job != first["job"]:
            raise ConnectionError(
                f"at {where} meets another job ({first['job']}, this one is {job}): {OWN_PORT}"
            )
        if meeting.size != first["size"]:
            raise ValueError(
                f"{meeting.name} was started as one of {meeting.size} ranks, {first['name']} as "
                f"one of {first['size']}: start all with the same number of nodes and processes; "
                f"if these are two jobs, {OWN_PORT}"
            )
        if store.add(f"place-{rank}", 1) > 1:
            raise ValueError(
                f"another process at {where} is rank {rank}, too: start each process with a RANK "
                f"of its own; if these are two jobs, {OWN_PORT}"
            )
    except dist.DistError as error:
        raise TimeoutError(
            f"{meeting.name} waited for rank 0 at {where}: no answer ({first_line(error)})"
        ) from None
