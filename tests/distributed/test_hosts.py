"""Two hosts with addresses of their own and a cable between them: training under the deepspeed
launcher ends with the reason when the cable is cut, and goes on when it is back.

The hosts are Linux network namespaces, which need root and iproute2; skipped elsewhere, unless
CRYSFORGE_REQUIRE_HOSTS is set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.jobs import curve
from tests.distributed.ranks import ROOT, free_port

pytestmark = pytest.mark.distributed

TIMEOUT = 30
"""Seconds that a rank waits for the other."""
PATIENCE = 900
"""Seconds after which the test gives a job up; a few on an idle machine."""
STEPS = 40
JOB = [
    "--config", "configs/pretrain/tiny.yaml", "stages=[vae]", f"vae.max_steps={STEPS}",
    "vae.batch_size=16", "loader.workers=0", "trainer.log_every=1", "trainer.validate_every=0",
    "trainer.checkpoint_every=5", "trainer.deterministic=true", f"trainer.timeout_s={TIMEOUT}",
]  # fmt: skip


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


class Hosts:
    """Two network namespaces joined by a cable."""

    addresses = ("192.0.2.1", "192.0.2.2")

    def __init__(self) -> None:
        self.names = [f"crysforge{os.getpid()}{side}" for side in "ab"]
        self.jobs: list[subprocess.Popen] = []

    def open(self) -> None:
        """Raises OSError where this is not allowed."""
        try:
            for name in self.names:
                ip("netns", "add", name)
            left, right = self.names
            # the names of interfaces are those inside, so that nothing of this shows outside
            ip("-n", left, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0",
               "netns", right)  # fmt: skip
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        self.end()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def cable(self, state: str) -> None:
        """Pulls the cable out (`down`) or puts it back (`up`)."""
        ip("-n", self.names[0], "link", "set", "eth0", state)

    def start(self, hostfile: Path, *args: str) -> None:
        """Starts the launcher on both hosts, as a user does without ssh."""
        deepspeed = Path(sys.executable).with_name("deepspeed")
        port = free_port()
        environ = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
        for number, name in enumerate(self.names):
            command = [
                "ip", "netns", "exec", name, str(deepspeed), "--hostfile", str(hostfile),
                "--no_ssh", "--node_rank", str(number), "--master_addr", self.addresses[0],
                "--master_port", str(port), "launch/pretrain.py", *args,
            ]  # fmt: skip
            self.jobs.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environ, text=True, start_new_session=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip

    def wait(self) -> list[tuple[int, str]]:
        """Exit code and output of both launchers."""
        ended = [(job, job.communicate(timeout=PATIENCE)[0]) for job in self.jobs]
        self.jobs = []
        return [(job.returncode, output) for job, output in ended]

    def end(self) -> None:
        """Kills what is left."""
        for job in self.jobs:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
        self.jobs = []


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        without("there is no command ip (apt-get install iproute2)")
    hosts = Hosts()
    try:
        hosts.open()
    except OSError as error:
        without(str(error))
    try:
        yield hosts
    finally:
        hosts.close()


def without(reason: str) -> None:
    if os.environ.get("CRYSFORGE_REQUIRE_HOSTS"):
        pytest.fail(f"CRYSFORGE_REQUIRE_HOSTS is set, and no hosts can be made: {reason}")
    pytest.skip(f"no network namespaces here: {reason}")


def test_a_cut_cable_ends_the_job_and_it_resumes(hosts, data, tmp_path):
    run, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    job = [*JOB, f"data={data}"]
    hosts.start(hostfile, *job, f"run_dir={run}")
    while not (run / "checkpoints" / "vae-00000005" / "COMPLETE").is_file():
        assert [p.poll() for p in hosts.jobs] == [None, None], hosts.wait()
        time.sleep(0.01)
    hosts.cable("down")
    for rank, (code, output) in enumerate(hosts.wait()):
        assert code == 1, output[-3000:]
        assert f"error: rank {rank} lost the other ranks" in output, output[-3000:]
        assert "the same command continues" in output
        assert "Traceback" not in output
    steps = [step for step, _ in curve(run, "vae")]
    assert 5 <= len(steps) < STEPS
    hosts.cable("up")
    hosts.start(hostfile, *job, f"run_dir={run}")
    assert [code for code, _ in hosts.wait()] == [0, 0]
    hosts.start(hostfile, *job, f"run_dir={tmp_path / 'whole'}")
    assert [code for code, _ in hosts.wait()] == [0, 0]
    assert curve(run, "vae") == curve(tmp_path / "whole", "vae")
    assert len(curve(run, "vae")) == STEPS
