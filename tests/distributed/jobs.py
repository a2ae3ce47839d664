"""Runs launch scripts as a user would, on one or several ranks, and reads back their curves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.distributed.ranks import ROOT, free_port, rank_environ


def launch(script: str, *args: str, ranks: int | None = None, timeout: float = 300) -> str:
    """Runs `launch/<script>.py`; without `ranks` no launcher's variables are set. Returns the
    output of rank 0; a non-zero exit fails with the output."""
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *args]
    port = free_port()
    environs = [rank_environ(r, ranks, port) for r in range(ranks)] if ranks else [None]
    processes = [
        subprocess.Popen(
            command, env=e, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for e in environs
    ]
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (p, text) in enumerate(zip(processes, outputs, strict=True)):
        assert p.returncode == 0, f"rank {rank} exited with {p.returncode}:\n{text[-5000:]}"
    return outputs[0]


def curve(run: Path, stage: str, name: str = "train/loss") -> list[tuple[int, float]]:
    """The logged values of a scalar: [(step, value), …]."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x[name]) for x in lines if x["stage"] == stage and name in x]
