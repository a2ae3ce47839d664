"""Starts a function on several ranks, each its own process in one gloo group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


CHOOSE = "from crysforge.datapipe.common import threads; threads.choose()"
"""What every launch script begins with."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environ(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }


def run_ranks(target: str, size: int, timeout: float = 240, **kwargs) -> list:
    """Calls `module:function(**kwargs)` on `size` ranks; returns what each rank returned.

    Arguments and results travel as JSON. A failing rank fails the test with its output.
    """
    module, function = target.split(":")
    code = (
        f"{CHOOSE}; import json,sys; from {module} import {function} as f; "
        "out=f(**json.loads(sys.argv[1])); print('\\nRESULT'+json.dumps(out))"
    )
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(kwargs)],
            env=rank_environ(rank, size, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    results = []
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (p, text) in enumerate(zip(processes, outputs, strict=True)):
        assert p.returncode == 0, f"rank {rank} failed:\n{text[-4000:]}"
        results.append(json.loads(text.rsplit("RESULT", 1)[1]))
    return results
