"""A whole training on one page: the VAE stage on synthetic crystals, with the parts that the
framework is made of.

    python docs/one_page.py [DIRECTORY]

Crystals → shards → packed batches → a stage (encoder + objective) → optimiser → a model to load.
What is left out here is what trainer/loop adds: ranks, mixed precision, checkpoints, guards, logs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from crysforge import load
from crysforge.datapipe.crystals.prototypes import TARGETS, UNITS, prototypes
from crysforge.datapipe.graphs.packing import build, unpack
from crysforge.datapipe.loading.config import LoaderConfig
from crysforge.datapipe.loading.stream import Stream
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.writer import DatasetWriter
from crysforge.models.encoders import build_encoder
from crysforge.trainer.loop.optim import one_cycle, param_groups
from crysforge.trainer.runs.model_directory import describe_data, export_stage
from crysforge.trainer.stages.base import STAGES, Stage


def prepare(path: Path) -> Dataset:
    """Crystals to WebDataset shards: every fifth is held out for validation."""
    with DatasetWriter(path, list(TARGETS), units=dict(UNITS)) as writer:
        for i, crystal in enumerate(prototypes(size=240, seed=0)):
            writer.add("val" if i % 5 == 4 else "train", crystal)
        writer.finish({"what": "synthetic crystals"})
    return Dataset.open(path)


def loss_of(stage: Stage, batch) -> torch.Tensor:
    """A stage returns named sums and counts; the loss is the weighted sum of their means."""
    terms = stage(batch)
    means = {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}
    return sum(weight * means[name] for name, weight in stage.weights.items())


def stream(dataset: Dataset, split: str, stage: Stage, epochs: float | None) -> Stream:
    """Batches of a split: the stage says which graph its encoder needs, and what to hide."""
    return Stream(
        dataset,
        split,
        stage.encoder.graph,
        LoaderConfig(workers=0),
        batch_size=32,
        transform=stage.transform(),
        min_atoms=stage.min_atoms,
        epochs=epochs,
        train=epochs is not None,
    )


def train(stage: Stage, dataset: Dataset, epochs: float = 4) -> tuple[float, float]:
    """Trains a stage; its validation loss before and after."""
    train_stream = stream(dataset, "train", stage, epochs)
    optimiser = torch.optim.AdamW(param_groups(stage, stage.config.weight_decay))
    total, before = train_stream.total_steps, validate(stage, dataset)
    for step, batch in zip(range(total), train_stream, strict=False):
        rate, beta1 = one_cycle(step, total, stage.config.lr)
        for group in optimiser.param_groups:
            group["lr"], group["betas"] = rate, (beta1, 0.999)
        loss = loss_of(stage.train(), batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return before, validate(stage, dataset)


@torch.no_grad()
def validate(stage: Stage, dataset: Dataset) -> float:
    """Mean loss over the validation split."""
    losses = [loss_of(stage.eval(), batch) for batch in stream(dataset, "val", stage, None)]
    return float(torch.stack(losses).mean())


def main(root: Path) -> tuple[float, float]:
    """Runs it all; the validation loss before and after."""
    torch.manual_seed(0)
    dataset = prepare(root / "data")
    encoder = build_encoder({"name": "pddformer", "tiny": True})
    stage = STAGES["vae"](STAGES["vae"].Config(lr=3e-3), encoder)
    before, after = train(stage, dataset)
    print(f"validation loss {before:.3f} before, {after:.3f} after")

    export_stage(root / "model", stage, stage.state_dict(), describe_data(dataset))
    crystals = [crystal for _, crystal in dataset.read(dataset.split_items("val")[:3])]
    latents = load(root / "model").embed(crystals)
    batch = build(crystals, encoder.graph)
    print(f"{len(latents)} latents of width {latents.shape[1]} for {batch.num_atoms} atoms,")
    print(f"which the encoder sees as {batch.num_nodes} nodes and {batch.num_edges} edges")
    assert [c.id for c in unpack(batch)] == [c.id for c in crystals]
    return before, after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
