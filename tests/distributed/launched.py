"""A job of tests/distributed/faults.py under the deepspeed launcher: its ranks note their batches,
and faults hit them, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.faults import Ended, ended, run_rank
from tests.distributed.ranks import ROOT, free_port


def under_launcher(
    script: str,
    *args: str,
    ranks: int | None,
    faults: dict[int, dict[str, Any]] | None = None,
    own: dict[int, list[str]] | None = None,
    timeout: float = 600,
) -> Ended:
    """Starts a job on `ranks` ranks of this machine under the deepspeed launcher, in a process
    group of their own, and waits for its end; the exit code is the launcher's."""
    size = ranks or 1
    order = {
        "script": script,
        "args": [[*args, *(own or {}).get(r, ())] for r in range(size)],
        "faults": {str(k): v for k, v in (faults or {}).items()},
    }
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(size),
        "--master_port", str(free_port()), "--module", "tests.distributed.launched",
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        launcher = subprocess.run(
            [*command, json.dumps(order)], cwd=ROOT, timeout=timeout, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output.seek(0)
        return ended([launcher.returncode], output.read(), [])


if __name__ == "__main__":
    run_rank(json.loads(sys.argv[-1]), int(os.environ["RANK"]))
