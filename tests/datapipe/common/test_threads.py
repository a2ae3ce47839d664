"""Threads are chosen by this process's share of the machine, before torch is loaded; users win."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crysforge.datapipe.common import threads
from crysforge.datapipe.common.threads import CHOSEN, COUNT, PROCESSES, WAITING, Choice, Share
from crysforge.datapipe.common.workers import Workers

ROOT = Path(__file__).resolve().parents[3]


def bare(**settings: str) -> dict[str, str]:
    """The environment of a user who has set `settings` and nothing else of threads."""
    ours = {CHOSEN, PROCESSES, *threads.COUNTS, *threads.WAITINGS}
    return {k: v for k, v in os.environ.items() if k not in ours} | settings


def python(code: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with what a user may have set."""
    environ = bare(PYTHONPATH=str(ROOT), **settings)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True)


# Launch scripts


def recipes() -> list[Path]:
    """Scripts that a user starts: they end in `run(main)`."""
    others = ("__init__.py", "cli.py")
    found = [p for p in (ROOT / "launch").glob("*.py") if p.name not in others]
    assert len(found) >= 11
    return sorted(found)


def packages(nodes: list[ast.stmt]) -> set[str]:
    """Top-level names of what is imported anywhere in these statements."""
    found = set()
    for node in (n for top in nodes for n in ast.walk(top)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "crysforge.datapipe.common":
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.stem)
def test_launch_scripts_choose_before_anything_can_import_torch(path):
    body = ast.parse(path.read_text()).body
    calls = [i for i, n in enumerate(body) if ast.unparse(n).startswith("threads.choose(")]
    assert calls, "threads.choose() is not called at the top"
    assert packages(body[: calls[0]]) <= sys.stdlib_module_names


def test_what_launch_scripts_import_first_needs_nothing_else():
    for path in (
        threads.__file__,
        ROOT / "datapipe/__init__.py",
        ROOT / "datapipe/common/__init__.py",
    ):
        assert packages(ast.parse(Path(path).read_text()).body) <= sys.stdlib_module_names, path


def runtime(settings: dict[str, str], *command: str) -> dict[str, str]:
    """What the OpenMP runtime that torch brings says it was told."""
    environ = bare(OMP_DISPLAY_ENV="TRUE", **settings)
    done = subprocess.run(
        [sys.executable, *command], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    lines = (line.partition("=") for line in done.stderr.splitlines() if "'" in line)
    return {key.split()[-1]: value.strip().strip("'") for key, _, value in lines if key.strip()}


def test_the_runtime_heeds_what_is_chosen():
    told = runtime({}, "launch/pretrain.py", "--help")
    assert told[COUNT] == str(threads.share_of({}).threads)
    assert told[WAITING] == "PASSIVE"


def test_users_win():
    code = "from crysforge.datapipe.common import threads; threads.choose(); import torch"
    told = runtime({COUNT: "3", WAITING: "ACTIVE"}, "-c", code)
    assert (told[COUNT], told[WAITING]) == ("3", "ACTIVE")
    share = Share(cpus=8, threads=4, processes=1, total=8)
    choice = threads.plan({"MKL_NUM_THREADS": "2"}, share)
    assert choice.threads == 0 and "MKL_NUM_THREADS=2" in str(choice)
    choice = threads.plan({"GOMP_SPINCOUNT": "9", COUNT: ""}, share)
    assert str(choice) == "threads: 4 (8 CPUs); waiting: GOMP_SPINCOUNT=9"
    assert threads.plan({}, share, most=1).threads == 1
    assert threads.plan({COUNT: "7"}, share, most=1).threads == 0


def test_a_users_own_session_is_left_alone():
    code = (
        "import os, sys\n"
        "from crysforge import load; assert 'torch' in sys.modules\n"
        "from crysforge.datapipe.common import threads; threads.choose()\n"
        "print(threads.describe(), [k for k in os.environ if 'OMP_' in k or 'CRYSFORGE_T' in k])"
    )
    done = python(code)
    assert done.stdout == "threads: as torch had them; waiting: as torch had it []\n"


# Processes that start processes

CHOOSE = (
    "import os, sys, subprocess\n"
    "from crysforge.datapipe.common import threads\n"
    "threads.choose()\n"
    "print(threads.describe(), os.environ['OMP_NUM_THREADS'], flush=True)\n"
)


def test_what_a_process_chose_is_no_users_setting_in_its_children():
    """They have a share of their own; what the user has set reaches them."""
    code = CHOOSE + (
        "environ = {**os.environ, 'CRYSFORGE_PROCESSES': '1000'}\n"
        f"subprocess.run([sys.executable, '-c', {CHOOSE!r}], env=environ, check=True)\n"
    )
    own, childs = python(code).stdout.splitlines()
    assert "1000" not in own and "1000 processes" in childs and childs.endswith(" 1")
    own, childs = python(code, **{COUNT: "5"}).stdout.splitlines()
    assert own == childs == f"threads: {COUNT}=5; waiting: passive 5"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
@pytest.mark.parametrize("given", [{}, {COUNT: "1"}])
def test_one_thread_of_torchrun_is_no_users_setting(given):
    """It sets that where the user gives no number."""
    code = (
        "import os, sys, subprocess\n"
        "os.environ |= {'OMP_NUM_THREADS': '1', 'TORCHELASTIC_RUN_ID': 'none'}\n"
        "child = 'import os; from datapipe.common.threads import users; print(users(os.environ))'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)"
    )
    assert (COUNT in ast.literal_eval(python(code, **given).stdout)) == bool(given)


def inside(_: int) -> int:
    return torch.get_num_threads()


def test_workers_compute_with_one_thread_each():
    with Workers(inside, 2) as workers:
        assert set(workers.map(range(100))) == {1}


def test_workers_are_as_many_as_this_process_has_cpus(monkeypatch):
    monkeypatch.setenv(PROCESSES, "1000")
    with Workers(inside) as workers:
        assert workers.count == 1


@pytest.mark.parametrize(
    ("cores", "workers", "left", "used"),
    [(2, 2, 0, 2), (4, 8, 1, 3), (16, 2, 2, 14), (16, 8, 4, 12), (16, 0, 0, 16), (1, 4, 0, 1)],
)
def test_loader_workers_get_a_quarter_of_the_cores_at_most(monkeypatch, cores, workers, left, used):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    share = Share(cpus=cores, threads=cores, processes=1, total=cores)
    monkeypatch.setattr(threads, "_choice", threads.plan({}, share))
    for count in (8, workers):  # the last call counts
        threads.leave_cores(count)
    assert taken[-1] == used
    assert (f", {left} left to loader workers" in threads.describe()) == (left > 0)
    monkeypatch.setattr(threads, "_choice", Choice(share, count_by=f"{COUNT}={cores}"))
    taken.clear()
    threads.leave_cores(workers)
    assert not taken


# The share


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 logical CPUs: `machine(own, parents, files)` is the tree of a process that
    may run on `own` of them, whose parent may on `parents`, with these files below proc and sys."""

    def make(own: int = 16, parents: int = 16, files: dict[str, str] | None = None) -> Path:
        allowed = {0: own, os.getppid(): parents}
        monkeypatch.setattr(threads, "_affinity", lambda process: set(range(allowed[process])))
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "8"}
STEP = {"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 1),  # nobody launched this process
        ({**LAUNCHED, "LOCAL_WORLD_SIZE": "4"}, 4),
        ({**LAUNCHED, "LOCAL_SIZE": "2"}, 2),
        ({**LAUNCHED, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 8),
        ({**LAUNCHED, "MASTER_ADDR": "127.0.0.1"}, 8),
        ({**LAUNCHED, "MASTER_ADDR": "10.0.0.1"}, 1),
        ({**LAUNCHED, "LOCAL_WORLD_SIZE": "many"}, 1),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, 3),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4"}, 1),
        ({**STEP, **LAUNCHED, "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "1,1"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 1),  # a batch shell
        ({PROCESSES: "4"}, 4),
        ({**LAUNCHED, "LOCAL_WORLD_SIZE": "2", PROCESSES: "4"}, 4),
        ({PROCESSES: "0"}, 1),
    ],
)
def test_processes_on_this_machine(machine, environ, processes):
    share = threads.share_of(environ, machine())
    assert share == Share(16 // processes, 16 // processes, processes, 16)


@pytest.mark.parametrize(
    ("own", "parents", "environ", "cpus"),
    [
        (4, 16, {}, 4),  # taskset
        (16, 16, {"LOCAL_WORLD_SIZE": "4"}, 4),
        (4, 16, {"LOCAL_WORLD_SIZE": "4"}, 4),  # bound to its own
        (4, 4, {"LOCAL_WORLD_SIZE": "4"}, 1),  # all of them within four
        (8, 16, {"LOCAL_WORLD_SIZE": "4"}, 4),  # bound to a half that two share
        (16, 16, {"LOCAL_WORLD_SIZE": "40"}, 1),
        (4, 4, {"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "16"}, 4),
        (16, 16, {"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "8"}, 2),
    ],
)
def test_bound_and_shared_cores(machine, own, parents, environ, cpus):
    assert threads.share_of({**LAUNCHED, **environ}, machine(own, parents)).cpus == cpus


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000\n"}, 6),
        (
            {
                "proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "700000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            7,
        ),
        (
            {  # in a container, which sees its own group as the topmost
                "proc/self/cgroup": "4:cpuacct,cpu:/docker/0123\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_quota_of_the_control_group(machine, files, cpus):
    root = machine(files=files)
    assert threads.share_of({}, root).cpus == cpus
    two = threads.share_of({**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}, root)
    assert two.cpus == max(1, cpus // 2)


def test_two_threads_of_a_core_count_once(machine):
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 8},{n % 8 + 8}\n"
        for n in range(16)
    }
    root = machine(files=siblings)
    assert threads.share_of({}, root) == Share(cpus=16, threads=8, processes=1, total=16)
    assert threads.share_of({PROCESSES: "4"}, root) == Share(4, 2, 4, 16)
    assert threads.share_of({}, machine(own=8)).threads == 8  # one thread of each core


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_of_this_process():
    code = (
        "import os, json; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from crysforge.datapipe.common import threads; threads.choose(); import torch\n"
        "print(json.dumps([threads.share_of({}).cpus, torch.get_num_threads()]))"
    )
    assert json.loads(python(code).stdout) == [1, 1]
