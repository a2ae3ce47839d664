"""A real Slurm on one machine: munged, a controller and two node daemons, for as long as a block
lasts, as root or as any user.

    python -m tests.slurm.cluster              a shell that talks to it
    python -m tests.slurm.cluster COMMAND …    one command
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

WARDEN = "--end-with-stdin"

CONFIG = """\
ClusterName=crysforge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as credentials live: two minutes by default.
AuthInfo=socket={root}/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
# Short, for a node that is killed; long enough for one that a loaded machine holds up.
SlurmdTimeout=25
KillWait=60
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin")


class Cluster:
    """Daemons in a directory of their own. Use as a context manager.

    Attributes:
        environ: what a process needs so that `sbatch` and its kin talk to this cluster.
    """

    def __init__(self, cpus: int = 2) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)
        self.cpus = cpus
        self.environ = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        self._warden: subprocess.Popen | None = None

    def __enter__(self) -> Cluster:
        try:
            self._warden = subprocess.Popen(  # whatever becomes of this process
                [sys.executable, __file__, WARDEN, str(self.root)],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            self._configure()
            self._start("munged")
            self._wait(lambda: (self.root / "munge.socket").exists(), "munged opens its socket")
            self._start("slurmctld")
            for node in NODES:
                self.start_node(node)
            self._wait(lambda: self.node_states() == ["idle", "idle"], "both nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._warden is not None:
            self._warden.communicate()
        for daemon in self._daemons.values():
            daemon.wait()

    def _configure(self) -> None:
        ports = _free_ports(3)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIG.format(
            host=socket.gethostname(),
            ports=ports,
            user=getpass.getuser(),
            root=self.root,
            nodes=nodes,
        )
        (self.root / "slurm.conf").write_text(text)
        # No control groups: neither of the two is used, but slurmd insists on one it can load.
        version = tuple(
            int(x) for x in self.run(_find("slurmd") or "", "-V").split()[1].split(".")[:2]
        )
        plugin = "disabled" if version >= (23, 2) else "cgroup/v1"
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.root / "state").mkdir()
        for node in NODES:
            (self.root / f"spool-{node}").mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start(self, name: str, *args: str) -> None:
        """Starts a daemon in the foreground of its own session."""
        options = {
            "munged": [
                "--foreground",
                "--force",
                f"--socket={self.root}/munge.socket",
                f"--key-file={self.root}/munge.key",
                f"--pid-file={self.root}/munged.pid",
                f"--log-file={self.root}/munged.log",
                f"--seed-file={self.root}/munged.seed",
            ],
            "slurmctld": ["-D", "-f", f"{self.root}/slurm.conf"],
            "slurmd": ["-D", "-f", f"{self.root}/slurm.conf"],
        }[name]
        program = _find(name)
        assert program is not None
        log = open(self.root / f"{name}{''.join(args)}.out", "ab")  # noqa: SIM115
        with log:
            self._daemons[" ".join([name, *args])] = subprocess.Popen(
                [program, *options, *args],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._start("slurmd", "-N", node)

    def fail_node(self, node: str) -> None:
        """What a power cut does: the daemon of a node and all it started are gone at once, and
        nobody is left to say so."""
        daemon = self._daemons.pop(f"slurmd -N {node}")
        daemon.kill()
        daemon.wait()
        tasks = self.processes(f"SLURMD_NODENAME={node}")
        for pid in [*{parent(pid) for pid in tasks} - set(tasks), *tasks]:  # step daemons first
            if pid in tasks or _name(pid) == "slurmstepd":
                _kill(pid)

    def processes(self, setting: str = "") -> list[int]:
        """Processes that this cluster started (and those that talk to it) whose environment has a
        variable that starts as `NAME=VALUE` does."""
        return processes(self.root, setting)

    def run(self, *command: str, timeout: float = 60) -> str:
        """The output of a Slurm command; a failure raises with its words."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}: {done.stderr}")
        return done.stdout

    def node_states(self) -> list[str]:
        """State of each node, in order of their names; empty while the controller is starting."""
        try:
            text = self.run("sinfo", "--Node", "--noheader", "--format=%N %t")
        except RuntimeError:
            return []
        return [line.split()[1] for line in sorted(text.splitlines())]

    def logs(self) -> str:
        """The ends of all daemons' logs, for the message of a failure."""
        paths = sorted([*self.root.glob("*.log"), *self.root.glob("*.out")])
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in paths)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_for(condition, what)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from None


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = 600, pause: float = 0.3
) -> None:
    """Returns when the condition holds, looked at again after every pause; TimeoutError says what
    was waited for. The limit is for what never comes; how long things take is no matter."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(pause)


def processes(root: Path, setting: str = "") -> list[int]:
    """Processes of the cluster in a directory; see `Cluster.processes`."""
    found = []
    wanted = {f"SLURM_CONF={root}/".encode(), setting.encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if all(any(v.startswith(w) for v in variables) for w in wanted):
                found.append(int(path.parent.name))
    return found


def keep_watch(root: Path) -> None:
    """Waits until the one who started the cluster has closed the pipe, or is gone however it went;
    then ends all that the cluster has started, and removes its directory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()
    while pids := [pid for pid in processes(root) if state(pid) not in ("Z", "")]:
        for pid in pids:
            _kill(pid)
        time.sleep(0.05)
    shutil.rmtree(root, ignore_errors=True)


def state(pid: int) -> str:
    """R, S, T (stopped), Z (zombie), …; empty if the process is gone."""
    return _stat(pid)[0]


def parent(pid: int) -> int:
    """0 if the process is gone."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return ["", "0"]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def running(cpus: int = 2) -> Iterator[Cluster]:
    """A cluster of two nodes with `cpus` CPUs each, as far as Slurm is told."""
    with Cluster(cpus) as cluster:
        yield cluster


def main() -> int:
    if sys.argv[1:2] == [WARDEN]:
        keep_watch(Path(sys.argv[2]))
        return 0
    if missing():
        print(f"missing programs: {', '.join(missing())}", file=sys.stderr)
        return 2
    command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
    with running() as cluster:
        return subprocess.call(command, env=cluster.environ)


if __name__ == "__main__":
    raise SystemExit(main())
