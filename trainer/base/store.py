"""How the ranks of a job find each other: rank 0 hosts a key-value store, the others reach it, and
where that cannot be one line says which setting is wrong."""

from __future__ import annotations

import contextlib
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ANSWER_S = 30.0
"""Most seconds in which rank 0 answers a connection that the system has accepted for it."""
OWN_PORT = "set MASTER_PORT (deepspeed --master_port, torchrun --master-port) to a free one"
_FILES = 65536
"""Open files that rank 0 asks for: every rank has two connections to it."""


class Silent(Exception):
    """The store does not answer in time."""


class Connection:
    """A connection to the store whose answers are not waited for without end, as torch does where a
    host is frozen or a cable is cut.

    Attributes:
        store: what answers.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._silent = False
        threading.Thread(target=self._answer, name="store", daemon=True).start()

    def ask(self, question: Callable[[dist.Store], Any], seconds: float) -> Any:
        """What a question has for an answer.

        Raises:
            Silent: none within the seconds, now or before.
            dist.DistError: the store is gone.
        """
        if self._silent:
            raise Silent("no answer")
        answers: queue.SimpleQueue = queue.SimpleQueue()
        self._asked.put((question, answers))
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            self._silent = True
            raise Silent(f"no answer for {seconds:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _answer(self) -> None:
        while True:
            question, answers = self._asked.get()
            try:
                answers.put(question(self.store))
            except Exception as error:
                answers.put(error)


def address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0. Raises ValueError if the launcher left them out."""
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if not host or not port:
        raise ValueError(
            "several processes but no MASTER_ADDR and MASTER_PORT: start with the deepspeed "
            "launcher, torchrun, or launch/submit.py"
        )
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT={port} is no port: give a number from 1024 to 65535")
    return host, int(port)


def resolve(host: str, end: float) -> None:
    """Returns if the name of rank 0's host has an address; a name service that is away for now may
    come back until `end` (of `time.monotonic`).

    Raises:
        ValueError: there is no such host.
        ConnectionError: the name service stays away.
    """
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN
            if not again or time.monotonic() > end:
                raise (ConnectionError if again else ValueError)(
                    f"MASTER_ADDR={host} is no host that {socket.gethostname()} can find "
                    f"({getattr(error, 'strerror', None) or error}): set MASTER_ADDR (deepspeed "
                    "--master_addr, torchrun --master-addr) to the name or address of rank 0's host"
                ) from None
        time.sleep(1)


def host_store(host: str, port: int) -> dist.TCPStore:
    """The store, held by this process.

    Raises:
        ConnectionError: something else holds the port.
        ValueError: the port cannot be used.
    """
    with contextlib.suppress(OSError, ValueError):  # a limit beyond the system's own
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    here = host if _is_here(host) else "localhost"  # a name that only others reach it by
    wait = timedelta(seconds=ANSWER_S)
    try:
        return dist.TCPStore(here, port, None, True, wait, wait_for_workers=False)
    except dist.DistError as error:
        where = f"port {port} of {socket.gethostname()}"
        if "EADDRINUSE" in str(error):
            raise ConnectionError(f"{where} is taken, perhaps by another job: {OWN_PORT}") from None
        raise ValueError(f"{where} cannot be used ({first_line(error)}): {OWN_PORT}") from None


def _is_here(host: str) -> bool:
    """Whether an address of `host` is one of this machine's."""
    for family, kind, protocol, _, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
            return True
    return False


def reach_store(host: str, port: int, timeout_s: float, end: float) -> dist.TCPStore:
    """A connection to rank 0's store, as soon as it is there, or until `end` (of
    `time.monotonic`), which is `timeout_s` after the start.

    Raises:
        TimeoutError: nobody listens there.
        ConnectionError: something else does.
    """
    where, here, pause = f"{host}:{port}", socket.gethostname(), 0.05
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, left))).close()
            break
        except OSError as error:
            if time.monotonic() + pause > end:
                raise TimeoutError(
                    f"{here} found nobody at {where} within {timeout_s:g} s (trainer.timeout_s): "
                    "rank 0 has not started or has ended, or MASTER_ADDR and MASTER_PORT are not "
                    f"where it runs ({error.strerror or 'no answer'})"
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    seconds = max(1.0, min(ANSWER_S, end - time.monotonic()))
    found: list[dist.TCPStore] = []

    def connect() -> None:
        wait = timedelta(seconds=seconds)
        with contextlib.suppress(dist.DistError):
            found.append(dist.TCPStore(host, port, None, False, wait, wait_for_workers=False))

    thread = threading.Thread(target=connect, daemon=True)  # torch waits for ever for a mute peer
    thread.start()
    thread.join(seconds + 1)
    if not found:
        raise ConnectionError(
            f"what answers {here} at {where} is not rank 0 of this job, or it has ended or hangs: "
            f"{OWN_PORT}"
        )
    return found[0]


def span(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: `rank 3`, `ranks 0, 2-5 and 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    if len(parts) > 8:
        parts = [*parts[:7], f"others, {len(ranks)} in all"]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def first_line(error: Exception) -> str:
    """What fits into a message."""
    return str(error).partition("\n")[0][:200]
