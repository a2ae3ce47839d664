"""Submits jobs to Slurm, one or a whole sweep, and keeps them going until they are done.

    python launch/submit.py job=pretrain nodes=2 gpus=4 cpus=8 time=12:00:00 partition=gpu \\
        --config configs/pretrain/crysldnet.yaml data=DIR run_dir=RUN
    python launch/submit.py job=finetune gpus=1 time=2:00:00 --config configs/finetune/tiny.yaml \\
        data=DIR init_from=RUN run_dir=runs/sweep 'sweep=[target=[e_form,gap],seed=[0,1,2]]'
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import status
from launch.cluster import run_here, run_local, script, slurm_executor, submit_slurm
from launch.request import Request
from launch.submission import ROOT, new_attempt
from trainer.config import run


def main() -> None:
    request = Request.parse(sys.argv[1:], __doc__)
    config = request.config
    if config.status:
        print(status.table(status.statuses(config.status)))
        return
    if config.collect:
        path, rows, done = status.collect(config.collect)
        print(f"{done} of {rows} cells have results: {path}")
        return
    if config.cancel:
        print(f"{status.cancel(config.cancel)} jobs ended")
        return

    cells = request.cells()
    submission = request.submission()
    left = request.left(submission, cells)
    name = request.output.name
    if config.dry_run:
        if config.cluster == "slurm":
            code = submission.folder / f"code-{len(submission.attempts) + 1}"
            print(script(slurm_executor(config, name, submission.folder, code), len(left)))
        for cell in left:
            print(f"# {cell.name}: {config.job} → {cell.output}")
        return
    if not left:
        print("nothing to submit")
        return
    code = ROOT if config.cluster == "debug" else submission.snapshot()
    tasks = request.tasks(submission, left, code)
    submission.write()
    if config.cluster == "debug":
        submission.attempts.append(new_attempt("debug", code, {c.name: "debug" for c in left}))
        submission.write()
        failed = run_here(tasks, submission.folder)
    elif config.cluster == "local":
        attempt = new_attempt("local", code, {})
        submission.attempts.append(attempt)

        def started(cell: str, id: str) -> None:
            attempt["ids"][cell] = id
            submission.write()

        failed = run_local(config, tasks, submission.folder, code, started)
    else:
        executor = slurm_executor(config, name, submission.folder, code)
        submission.attempts.append(new_attempt("slurm", code, submit_slurm(executor, tasks)))
        submission.write()
        ids = submission.attempts[-1]["ids"].values()
        print(f"submitted {len(tasks)} cell(s) as job {sorted({i.split('_')[0] for i in ids})[0]}")
        print(f"status:  python launch/submit.py status={request.output}")
        print(f"logs:    {submission.folder / 'logs'}")
        return
    print(status.table(status.of_submission(submission)))
    if failed:
        raise ValueError(f"{len(failed)} of {len(tasks)} cells did not finish: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
