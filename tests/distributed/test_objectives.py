"""Every objective learns the same on two ranks as on one, also those that compare the crystals of
a batch with each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from crysforge.models.objectives.contrastive import barlow_twins, gather_rows, nt_xent
from tests.distributed.jobs import curve, launch
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

STAGES = ["dpf", "crysxpp", "crysgnn", "crystal_twins", "crysdiff"]
STEPS = 3
JOB = [
    "encoder.name=pddformer",
    "encoder.tiny=true",
    f"stages=[{','.join(STAGES)}]",
    "crysdiff.denoiser={width: 16, layers: 1, frequencies: 4}",
    "crysdiff.timesteps=50",
    *(
        f"{s}.{k}"
        for s in STAGES
        for k in (f"max_steps={STEPS}", "batch_size=8", "lr=2e-4", "pct_start=0")
    ),
    "trainer.log_every=1",
    "trainer.validate_every=0",
    "loader.workers=0",
]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The same job on one rank and on two, all stages in one."""
    root = tmp_path_factory.mktemp("runs")
    for name, ranks in (("one", None), ("two", 2)):
        launch("pretrain", *JOB, f"data={data}", f"run_dir={root / name}", ranks=ranks)
    return root / "one", root / "two"


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_as_one(runs, stage):
    one, two = (curve(run, stage) for run in runs)
    assert [step for step, _ in one] == list(range(1, STEPS + 1))
    for (_, x), (_, y) in zip(one, two, strict=True):
        assert y == pytest.approx(x, rel=1e-4)


GENERATIVE = [
    "encoder={name: cspnet, width: 16, layers: 1, frequencies: 4, elements: vector}",
    "stages=[csp,ab_initio]",
    "ab_initio.types=masked",
    "ab_initio.coords=torus_linear",
    "ab_initio.lattice=linear",
    "ab_initio.sampling={method: euler, corrector: 0}",
    "ab_initio.sampling.steps=20",
    *(
        f"{s}.{k}"
        for s in ("csp", "ab_initio")
        for k in (f"max_steps={STEPS}", "batch_size=8", "lr=2e-4", "pct_start=0")
    ),
    *JOB[-3:],
]


@pytest.fixture(scope="module")
def generative_runs(data, tmp_path_factory):
    """Stages that make crystals, likewise."""
    root = tmp_path_factory.mktemp("generative")
    for name, ranks in (("one", None), ("two", 2)):
        launch("pretrain", *GENERATIVE, f"data={data}", f"run_dir={root / name}", ranks=ranks)
    return root / "one", root / "two"


@pytest.mark.parametrize("stage", ["csp", "ab_initio"])
def test_two_ranks_learn_to_generate_as_one(generative_runs, stage):
    test_two_ranks_learn_as_one(generative_runs, stage)


def test_two_ranks_generate_what_one_does(generative_runs, tmp_path):
    """The same bytes."""
    job = [f"checkpoint={generative_runs[0]}", "n=12", "atoms=3", "max_atoms=12", "pictures=0"]
    job.append("sampling.steps=4")
    for name, ranks in (("one", None), ("two", 2)):
        launch("generate", *job, f"output={tmp_path / name}", ranks=ranks)
    found = [(tmp_path / n / "generated.extxyz").read_bytes() for n in ("one", "two")]
    assert found[0] == found[1] and found[0].count(b"Lattice") > 6


SIZES = {"even": [4, 4], "uneven": [5, 3], "one rank has none": [8, 0]}


def rows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, 6, dtype=torch.float64, generator=g)
    return x, torch.tensor([0, 1, 0, 2, 1, 0, 3, 2])


def losses(part: slice) -> list:
    """Totals, counts, and gradients of the rows of a part."""
    x, labels = rows()
    x, labels = x[part].requires_grad_(), labels[part]
    out = []
    for total, count in (nt_xent(x[:, 0], labels, 0.1), barlow_twins(x[:, 0], x[:, 1], 0.1)):
        (gradient,) = torch.autograd.grad(total, x)
        out.append([float(total.detach()), float(count), gradient.tolist()])
    return out


def every_case() -> list:
    """Runs on a rank: all cases, in one start of the processes."""
    dist.init_process_group("gloo")
    rank, out = dist.get_rank(), []
    for sizes in SIZES.values():
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        out.append(losses(part))
        gathered, start = gather_rows(rows()[0][part])
        assert torch.equal(gathered, rows()[0]) and start == part.start
    dist.destroy_process_group()
    return out


def test_a_batch_over_two_ranks_is_one_batch():
    first, second = run_ranks("tests.distributed.test_objectives:every_case", 2)
    whole = losses(slice(None))
    for a, b in zip(first, second, strict=True):
        for (total, count, gradient), x, y in zip(whole, a, b, strict=True):
            assert x[0] + y[0] == pytest.approx(total, rel=1e-5)
            assert x[1] + y[1] == count
            found = torch.tensor(x[2] + y[2])
            torch.testing.assert_close(found, torch.tensor(gradient), rtol=1e-4, atol=1e-5)
