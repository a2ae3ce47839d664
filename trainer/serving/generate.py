"""Generation as a job: a folder of ranked crystals, continued where it was left."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.files import make_directory, remove_tree, sha256, write_json
from crysforge.datapipe.common.safe_read import parse_json
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.preparing.duplicates.matcher import Matcher
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base.distributed import World
from crysforge.trainer.base.tensors import code_version
from crysforge.trainer.generation.config import (
    AGREEMENT,
    GenerateConfig,
    numbers_of,
    parse_units,
)
from crysforge.trainer.generation.files import RankedRow, describe, write_failed, write_rows
from crysforge.trainer.generation.guiding import guidance
from crysforge.trainer.generation.known import Known, composition_of
from crysforge.trainer.generation.picture import picture
from crysforge.trainer.generation.ranking import Judge, Ranked, ranked
from crysforge.trainer.generation.request import (
    Asked,
    chunks,
    of_formula,
    of_nothing,
    of_table,
    of_targets,
)
from crysforge.trainer.generation.work import Chunks
from crysforge.trainer.runs.model_directory import open_model
from crysforge.trainer.serving.generator import Generator
from crysforge.trainer.serving.predictor import Predictor

REQUEST, REPORT = "request.json", "report.json"
_NO_REQUEST = ("checkpoint", "output", "pictures", "cifs", "force")
"""Settings that do not change what is made."""


@dataclass(frozen=True)
class Generation:
    """One request and the model that answers it."""

    config: GenerateConfig
    model: Generator
    asked: list[Asked]
    work: Chunks

    @classmethod
    def of(cls, config: GenerateConfig, model: Generator) -> Generation:
        """Raises ValueError for a request that the model cannot answer."""
        asked = _asked(config, model)
        model.require_known(asked, config.force)
        output = Path(config.output)
        work = Chunks(
            chunks(asked, config.max_atoms),
            output / "chunks",
            model.sampling(config.sampling),
            config.trajectory,
        )
        return cls(config, model, asked, work)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def text(self) -> str:
        """One line on what is to be done."""
        sampling = self.work.sampling
        return (
            f"{len(self.asked)} samples in {len(self.work.chunks)} chunks, {sampling.calls} network"
            f" calls each ({sampling.method}, {sampling.steps} steps)"
        )

    def begin(self) -> bool:
        """Claims the output; whether all is there already.

        Raises:
            ValueError: it holds something else.
        """
        make_directory(self.output)
        path, request = self.output / REQUEST, self._request()
        if path.exists():
            known = parse_json(path.read_bytes(), str(path))
            if known != request:
                raise ValueError(f"{self.output} holds another request: choose another output")
            return (self.output / REPORT).is_file()
        if any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty: choose another output")
        write_json(path, request)
        return False

    def _request(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        settings = {k: v for k, v in config.items() if k not in _NO_REQUEST}
        weights = sha256(open_model(self.config.checkpoint, self.config.stage).file)
        value = {**settings, "weights_sha256": weights}
        return json.loads(json.dumps(value))

    def make(self, world: World) -> None:
        """Makes this rank's chunks."""
        make_directory(self.work.folder)
        settings = self.config.guidance
        guide = guidance(settings, self.model.maker) if settings.checkpoint else None
        self.work.make(self.model.maker, world.rank, world.size, guide, progress=world.main)

    def finish(self) -> dict[str, Any]:
        """Ranks what was made and writes it; the report."""
        began = time.monotonic()
        found, seconds = self.work.read()
        made = [(a, found[a.wanted.name]) for a in self.asked]
        good = [(a, c) for a, c in made if isinstance(c, Crystal)]
        failed = [(a, c) for a, c in made if isinstance(c, BadCrystal)]
        judge = None if self.config.judge == AGREEMENT else _energies(self.config.judge)
        agree = not any(a.target for a in self.asked)  # what is evaluated is not compared here
        order = ranked(good, judge, agree)
        rows = self._rows(order)
        write_rows(self.output, rows, self.config.cifs)
        write_failed(self.output, ((_question(a), error) for a, error in failed))
        if self.config.pictures and rows:
            self._draw(rows)
        sampling = self.work.sampling
        report = {
            **self._request(),
            "asked": len(self.asked),
            "made": len(good),
            "failed": len(failed),
            "ranked_by": self._judge_name(),
            "sampling": dataclasses.asdict(sampling),
            "calls_per_sample": sampling.calls,
            "seconds_sampling": round(seconds, 3),
            "seconds_ranking": round(time.monotonic() - began, 3),
            "device": str(self.model.device),
            "stage": self.model.maker.name,
            "code": code_version(),
        }
        write_json(self.output / REPORT, report)
        remove_tree(self.work.folder)
        return report

    def _judge_name(self) -> str:
        if self.config.judge != AGREEMENT:
            return f"energy predicted by {self.config.judge}"
        if self.config.n or any(a.target for a in self.asked):
            return "nobody"
        return AGREEMENT

    def _rows(self, order: Sequence[Ranked]) -> list[RankedRow]:
        known = None
        if self.config.reference:
            wanted = {composition_of(r.crystal) for r in order}
            known = Known.of(Dataset.open(self.config.reference), wanted, ["train"])
        rows, by = [], self._judge_name()
        for number, entry in enumerate(order, start=1):
            values = {
                **_question(entry.asked),
                "number": number,
                "rank": entry.rank,
                "score": "" if math.isnan(entry.score) else f"{entry.score:.6g}",
                "scored_by": "" if math.isnan(entry.score) else by,
                "same_as": entry.same_as,
                **describe(entry.crystal),
                "training_crystal": known.same(entry.crystal, _SAME) if known else "",
            }
            rows.append(RankedRow(entry.crystal, values))
        return rows

    def _draw(self, rows: Sequence[RankedRow]) -> None:
        """The best of each structure first."""
        chosen = sorted(rows, key=lambda r: (bool(r.values["same_as"]), r.values["rank"]))
        shown = [(r.crystal, _caption(r.values)) for r in chosen[: self.config.pictures]]
        picture(self.output / "picture.png", shown)


_SAME = Matcher(stol=0.3)


def _asked(config: GenerateConfig, model: Generator) -> list[Asked]:
    if config.n:
        elements = numbers_of(config.elements)
        return of_nothing(model.maker, config.n, config.atoms, elements, config.seed)
    units = parse_units(config.z)
    if config.formula:
        return of_formula(config.formula, units, config.samples, config.seed)
    if Path(config.input).is_file():
        return of_table(Path(config.input), units, config.samples, config.seed)
    data = Dataset.open(config.input)
    return of_targets(data, config.split, config.samples, config.seed, config.count)


def _question(asked: Asked) -> dict[str, Any]:
    return {
        "name": asked.wanted.name,
        "formula": asked.formula,
        "z": asked.units or "",
        "sample": asked.sample,
        "target": asked.target,
    }


def _caption(values: Mapping[str, Any]) -> str:
    score = f", {values['score']}" if values["score"] else ""
    group = values["space_group_0.1"]
    return f"{values['name']}\nno. {values['rank']}{score}, space group {group}"


def _energies(run: str) -> Judge:
    """Predictions of a finetuned run, the target that is first."""
    model = Predictor(open_model(run))
    model.require_head()

    def judge(crystals: Sequence[Crystal]) -> list[float]:
        out = []
        for crystal in crystals:
            try:
                cell = model.trained_on.cells(crystal)
                [(_, row)] = model.iterate([cell])
            except ValueError:
                out.append(math.nan)
                continue
            out.append(math.nan if isinstance(row, BadCrystal) else float(row[0]))
        return out

    return judge
