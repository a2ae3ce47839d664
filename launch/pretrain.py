"""Pretrains a crystal encoder: one stage after another, each handing its encoder on.

    deepspeed launch/pretrain.py --config configs/pretrain/crysldnet.yaml data=DIR run_dir=RUN
    deepspeed --num_gpus 2 launch/pretrain.py --config configs/pretrain/tiny.yaml data=DIR …
    python launch/pretrain.py --config configs/pretrain/tiny.yaml data=DIR … stages=[vae]

A killed run continues with the same command. SIGTERM, SIGUSR1, SIGUSR2 and the end of the walltime
make a run save and exit with code 75: start it again. Ctrl-C does so, too, with code 130.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base import distributed
from crysforge.trainer.base.agreement import same_file
from crysforge.trainer.base.command_line import parse, required, to_yaml
from crysforge.trainer.base.script import CONTINUES, run
from crysforge.trainer.base.signals import StopRequest
from crysforge.trainer.jobs import setup as jobs
from crysforge.trainer.jobs import starting
from crysforge.trainer.jobs.schemas import pretrain_schema
from crysforge.trainer.loop.fit import fit
from crysforge.trainer.loop.memory import memory_text
from crysforge.trainer.loop.session import Session
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.facts import job_facts
from crysforge.trainer.runs.model_directory import (
    WEIGHTS,
    describe_stage,
    export_stage,
    lineage,
    open_model,
)


def again() -> str:
    return CONTINUES


def main() -> None:
    config = parse(pretrain_schema(), __doc__)
    required(config, "data", "run_dir", "stages")
    stop = StopRequest(config.trainer.walltime_minutes, config.trainer.walltime_margin_minutes)
    sections = {name: getattr(config, name) for name in config.stages}
    micro = {name: jobs.micro_batch(section, config.trainer) for name, section in sections.items()}
    dataset = Dataset.open(config.data).with_fold(config.fold)
    jobs.check_splits(dataset, config.data, *jobs.splits_needed(sections))
    world = distributed.init(config.trainer.timeout_s, job_facts(config, dataset.manifest))
    threads.leave_cores(config.loader.workers)
    print(f"{world.describe()}; {threads.describe()}", flush=True)

    before = open_model(config.init_from, config.init_stage) if config.init_from else None
    encoder = starting.starting_encoder(config, dataset)
    start = starting.starting_lineage(config, dataset)
    data = jobs.learned_from(dataset, dataset.split_items("train"), start, read=False)
    directory = RunDirectory(config.run_dir)
    if not config.dry_run:
        settings = {name: jobs.settings_of(section) for name, section in sections.items()}
        identity = jobs.identity(config, dataset, encoder, {"stages": config.stages, **settings})
        record = jobs.claim(directory, world, to_yaml(config), identity, config.resume)

    for name, section in sections.items():
        if not config.dry_run and name in record["finished"]:
            before = open_model(directory.path, name)
            encoder, start = before.build_encoder(), lineage(directory.path, name)
            if world.main:
                print(f"{name}: already finished, taken from {directory.path / name}", flush=True)
            continue
        stage = jobs.new_stage(name, section, encoder, before, config, dataset)
        train, validation = (
            jobs.make_stream(
                dataset,
                split,
                stage,
                config,
                world,
                batch_size=micro[name],
                epochs=epochs,
            )
            for split, epochs in (("train", section.epochs), ("val", None))
        )
        if world.main:
            print(jobs.plan_text(stage, train, section, world, config.trainer.accumulation))
        if config.dry_run:
            if world.main:
                print(memory_text(stage, train.largest(), config.trainer, world), flush=True)
            continue
        if world.main:
            describe_stage(directory.path / name, stage, data, start=start)
        engine, result = fit(
            Session(
                stage=stage,
                config=section,
                trainer=config.trainer,
                train=train,
                validation=validation,
                run=directory,
                world=world,
                monitor=stage.monitor,
                stop=stop,
            )
        )
        weights = engine.weights()
        if world.main:
            directory.check_owner()
            export_stage(directory.path / name, stage, weights, data, start=start)
            directory.finish(name)
            print(f"{name}: {result.in_words()}", flush=True)
        for file in ("run.json", f"{name}/{WEIGHTS}"):
            same_file(world.meeting, directory.path / file)
        before = open_model(directory.path, name)
        encoder, start = before.build_encoder(), lineage(directory.path, name)
    if world.main and not config.dry_run:
        print(f"run: {directory.path}\ntensorboard: {directory.path / 'tensorboard'}", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    run(main, distributed.ended, again)
