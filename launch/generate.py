"""Makes crystals: formula in, ranked structures out; or crystals of the model's own choice.

    python launch/generate.py checkpoint=RUN formula=LiFePO4 z=1-4 samples=20 output=OUT
    python launch/generate.py checkpoint=RUN input=formulas.csv output=OUT
    python launch/generate.py checkpoint=RUN n=10000 output=OUT        stages ab_initio, crysldm
    python launch/generate.py checkpoint=RUN input=DATA samples=5 count=500 output=OUT

Writes generated.extxyz, ranked.csv, cifs/ (each structure as it is, as a POSCAR, and brought to its
symmetry), picture.png and report.json. Elements and sizes that the model has not learned from are
refused (force=true tries them). A killed command continues when it is given again; under torchrun
or deepspeed the chunks are shared among GPUs. Samples are the same for any number of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import CONTINUES, run
from crysforge.trainer.generation.config import GenerateConfig


def again() -> str:
    return CONTINUES


def ended(error: Exception | None, code: int) -> None:
    """Lets other ranks know, once this one may have any."""
    if distributed := sys.modules.get("crysforge.trainer.base.distributed"):
        distributed.ended(error, code)


def main() -> None:
    config = parse(GenerateConfig, __doc__)
    required(config, "checkpoint", "output")
    if not (config.formula or config.input or config.n):
        raise ValueError("say what to make: formula=LiFePO4, input=formulas.csv or n=100")
    from crysforge.trainer.base import distributed
    from crysforge.trainer.runs.model_directory import open_model
    from crysforge.trainer.serving.generate import Generation
    from crysforge.trainer.serving.generator import Generator, generates

    exported = open_model(config.checkpoint, config.stage)
    if not generates(exported.stage):
        raise ValueError(f"{config.checkpoint} is of stage {exported.stage!r}, which makes none")
    world = distributed.init()
    job = Generation.of(config, Generator(exported, world.device))
    if world.share(job.begin() if world.main else None):
        if world.main:
            print(f"all is there already: {job.output}")
        return
    if world.main:
        print(f"{world.describe()}\n{job.text()}", flush=True)
    job.make(world)
    world.barrier()
    if world.main:
        report = job.finish()
        print(
            f"{report['made']} crystals ({report['failed']} failed) in "
            f"{report['seconds_sampling']:.3g} s, ranked by {report['ranked_by']}: {job.output}"
        )
    distributed.shutdown()


if __name__ == "__main__":
    run(main, ended, again)
