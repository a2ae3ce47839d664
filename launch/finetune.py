"""Finetunes an encoder on labels, on one device, and reports errors in physical units.

    python launch/finetune.py --config configs/finetune/tiny.yaml init_from=RUN target=e_form \\
        data=DIR run_dir=RUN2
    … init_from=none               from scratch
    … init_from=RUN init_stage=vae from the first pretraining stage
    … label_fraction=0.2 seed=1    from a fifth of the labels
    … init_from=RUN2 init_head=true finetune.epochs=0     RUN2 on other data, as it is (zero-shot)

A killed run continues with the same command; exit code 75 means that it asks for that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()


from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base import distributed
from crysforge.trainer.base.command_line import parse, required, to_yaml
from crysforge.trainer.base.script import CONTINUES, run
from crysforge.trainer.base.signals import StopRequest
from crysforge.trainer.base.tensors import copied_state
from crysforge.trainer.jobs import finetuning as reports
from crysforge.trainer.jobs import setup as jobs
from crysforge.trainer.jobs import starting
from crysforge.trainer.jobs.labels import chosen_items
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.loop.fit import fit
from crysforge.trainer.loop.session import FitResult, Session
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.facts import job_facts
from crysforge.trainer.runs.model_directory import describe_stage, export_stage


def again() -> str:
    return CONTINUES


def main() -> None:
    config = parse(FinetuneJob, __doc__)
    required(config, "data", "run_dir", "targets")
    stop = StopRequest(config.trainer.walltime_minutes, config.trainer.walltime_margin_minutes)
    config.trainer.engine = "torch"
    dataset = Dataset.open(config.data).with_fold(config.fold)
    learns = config.finetune.epochs > 0
    jobs.check_splits(dataset, config.data, *(("train", "val") if learns else ("test",)))
    items = chosen_items(dataset, config)
    world = distributed.init(config.trainer.timeout_s, job_facts(config, dataset.manifest))
    threads.leave_cores(config.loader.workers)
    print(f"{world.describe()}; {threads.describe()}")
    start = starting.starting_lineage(config, dataset)
    stage, scaler = jobs.finetune_stage(config, dataset, items["train"])
    streams = [
        jobs.make_stream(
            dataset,
            split,
            stage,
            config,
            world,
            batch_size=jobs.micro_batch(config.finetune, config.trainer),
            epochs=epochs,
            select=items[split],
        )
        for split, epochs in (("train", config.finetune.epochs), ("val", None))
        if learns
    ]
    if learns:
        accumulation = config.trainer.accumulation
        print(jobs.plan_text(stage, streams[0], config.finetune, world, accumulation))
    else:
        print(f"finetune: {config.init_from} on {len(items['test'])} test crystals, as it is")
    if config.dry_run:
        return

    directory = RunDirectory(config.run_dir)
    identity = jobs.identity(
        config,
        dataset,
        stage.encoder,
        {
            "targets": config.targets,
            "labels": len(items["train"]),
            "finetune": jobs.settings_of(config.finetune),
            **({"init_head": True} if config.init_head else {}),
            **({"atoms": config.atoms} if config.atoms else {}),
        },
    )
    record = jobs.claim(directory, world, to_yaml(config), identity, config.resume)
    if "finetune" in record["finished"]:
        print(f"{directory.path}: already finished, see metrics.json")
        return
    data = jobs.learned_from(dataset, items["train"], start, read=True)
    data["labels"] = len(items["train"])
    describe_stage(directory.path / "finetune", stage, data, scaler, start)
    began = time.monotonic()
    stage, result = stage.to(world.device), FitResult()
    if learns:
        train, validation = streams
        _, result = fit(
            Session(
                stage=stage,
                config=config.finetune,
                trainer=config.trainer,
                train=train,
                validation=validation,
                run=directory,
                world=world,
                monitor=stage.monitor,
                lr_scales=stage.lr_scales,
                patience=config.finetune.patience,
                stop=stop,
            )
        )
    directory.check_owner()
    export_stage(directory.path / "finetune", stage, copied_state(stage), data, scaler, start)
    metrics = reports.finetuned(stage, world, dataset, config, items, directory.path)
    metrics |= {"best_step": result.best_step, "steps": result.steps}
    metrics |= {"seconds": round(time.monotonic() - began, 1)}
    write_json(directory.path / "metrics.json", metrics)
    directory.finish("finetune")
    print(reports.summary(metrics, directory.path))


if __name__ == "__main__":
    run(main, distributed.ended, again)
