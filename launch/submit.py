"""Submits jobs to Slurm, one or a whole sweep, and keeps them going until they are done.

    python launch/submit.py job=pretrain nodes=2 gpus=4 cpus=8 time=12:00:00 partition=gpu \\
        --config configs/pretrain/crysldnet.yaml data=DIR run_dir=RUN
    python launch/submit.py job=finetune gpus=1 time=2:00:00 --config configs/finetune/tiny.yaml \\
        data=DIR init_from=RUN run_dir=runs/sweep 'sweep=[target=[e_form,gap],seed=[0,1,2]]'
    python launch/submit.py suite=configs/suites/low_data.yaml data_dir=data output=runs/low_data
    python launch/submit.py status=runs/sweep      table: state, step, loss or MAE, node, retries
    python launch/submit.py collect=runs/sweep     all results as runs/sweep/results.csv
    python launch/submit.py cancel=runs/sweep
    … site=FILE       settings of your cluster (partition, account, …) from a YAML file
    … cluster=local   processes on this machine instead
    … --dry-run       the sbatch script, and nothing else

Settings that are not listed below go to the job, as on its own command line, and are checked
before anything is submitted. The same command submits again what has not finished.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.launch.cluster import status
from crysforge.launch.cluster.code import ROOT
from crysforge.launch.cluster.config import SubmitConfig
from crysforge.launch.cluster.executors import (
    run_here,
    run_local,
    script,
    slurm_executor,
    submit_slurm,
)
from crysforge.launch.cluster.planning.jobs import PlannedRun, groups, settings_of, waves
from crysforge.launch.cluster.planning.request import Request
from crysforge.launch.cluster.submission import Submission, new_entry
from crysforge.launch.cluster.worker import Task
from crysforge.trainer.base.script import CONTINUES, run


def again() -> str:
    return CONTINUES


if TYPE_CHECKING:  # torch takes seconds, and the status of jobs needs none of it
    from crysforge.trainer.jobs.cost import Bill


def main() -> None:
    request = Request.parse(sys.argv[1:], __doc__)
    config = request.config
    if config.status:
        print(status.table(status.statuses(config.status)))
        return
    if config.collect:
        path, rows, done = status.collect(config.collect)
        print(f"{done} of {rows} runs have results: {path}")
        return
    if config.cancel:
        print(f"{status.cancel(config.cancel)} jobs ended")
        return

    runs = request.runs()
    submission, bill = request.submission(), None
    if request.suite:
        from crysforge.trainer.jobs.cost import Bill

        own = request.suite.config
        configs = {planned.name: (planned.job, planned.config) for planned in runs}
        bill = Bill(configs, own.hardware, own.rates)
    if config.dry_run:
        show(request, submission, request.left(submission, runs), bill)
        return
    with submission.alone():
        submit(request, request.submission(), runs, bill)  # as it is now


def submit(
    request: Request, submission: Submission, runs: list[PlannedRun], bill: Bill | None = None
) -> None:
    """Submits what has not finished, or runs it here.

    Raises:
        ValueError: runs on this machine did not finish; the cluster refuses.
    """
    config, left = request.config, request.left(submission, runs)
    request.record()
    if not left:
        print("nothing to submit")
        return
    if bill:
        print("\n".join(bill.total([c.name for c in left])))
    code = ROOT if config.cluster == "debug" else submission.snapshot()
    tasks = dict(zip((c.name for c in left), request.tasks(submission, left, code), strict=True))
    submission.history.append(new_entry(config.cluster, code, {}))
    submission.write()
    if config.cluster == "slurm":
        queue(request, submission, left, tasks, code)
        return
    unfinished = run_all(config, submission, left, tasks, code)
    print(status.table(status.of_submission(submission)))
    if unfinished:
        names = ", ".join(unfinished)
        raise ValueError(f"{len(unfinished)} of {len(tasks)} runs did not finish: {names}")


def show(
    request: Request, submission: Submission, left: list[PlannedRun], bill: Bill | None = None
) -> None:
    """Prints the scripts that would be submitted, the runs and what those of a suite cost."""
    code = submission.folder / f"code-{len(submission.history) + 1}"
    for group in groups(left):
        if request.config.cluster == "slurm":
            own = settings_of(request.config, group[0].job, group[0].after)
            executor = slurm_executor(own, request.output.name, submission.folder, code)
            print(script(executor, len(group)))
        for planned in group:
            price = f" ({bill.line(planned.name)})" if bill else ""
            print(f"# {planned.name}: {planned.job} → {planned.output}{price}")
    if bill:
        print("\n".join(f"# {line}" for line in bill.total([c.name for c in left])))


def queue(
    request: Request,
    submission: Submission,
    left: list[PlannedRun],
    tasks: Mapping[str, Task],
    code: Path,
) -> None:
    """Submits runs to Slurm: those that are alike and wait for the same as one array."""
    for group in groups(left):
        waits_for = [
            submission.job_id(name)[1] for name in group[0].after if not submission.finished(name)
        ]
        own = settings_of(request.config, group[0].job, waits_for)
        executor = slurm_executor(own, request.output.name, submission.folder, code)
        ids = submit_slurm(executor, [tasks[planned.name] for planned in group])
        submission.history[-1]["ids"].update(ids)
        submission.write()
        job = next(iter(ids.values())).split("_")[0]
        after = f", after {', '.join(group[0].after)}" if waits_for else ""
        print(f"submitted {len(group)} run(s) as job {job}{after}")
    print(f"status:  python launch/submit.py status={request.output}")
    print(f"logs:    {submission.folder / 'logs'}")


def run_all(
    config: SubmitConfig,
    submission: Submission,
    left: list[PlannedRun],
    tasks: Mapping[str, Task],
    code: Path,
) -> list[str]:
    """Carries runs out on this machine; returns those that did not finish or start."""

    def started(name: str, id: str) -> None:
        submission.history[-1]["ids"][name] = id
        submission.write()

    unfinished: list[str] = []
    for wave in waves(left):
        ready = [c for c in wave if all(map(submission.finished, c.after))]
        for planned in wave:
            if planned not in ready:
                print(f"{planned.name}: left out, since {', '.join(planned.after)} did not finish")
                unfinished.append(planned.name)
        todo = [tasks[planned.name] for planned in ready]
        if config.cluster == "debug":
            for task in todo:
                started(task.name, "debug")
            unfinished += run_here(todo, submission.folder)
        else:
            own = settings_of(config, wave[0].job)
            unfinished += run_local(own, todo, submission.folder, code, started)
    return unfinished


if __name__ == "__main__":
    run(main, again=again)
