"""What a stranger may try, attack by attack: each draws how, mounts it on real files, reads them
with the code that users call, and fails where it gets through; `tests/guarded.py` watches.

    python tests/fuzz.py cases=0 attacks=1000      each so often; docs/security.md
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import torch
import yaml

from crysforge import load
from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.edit_configs import (
    InspectConfig,
    MergeConfig,
    ReshardConfig,
    SubsetConfig,
    VerifyConfig,
)
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.remote import Access
from crysforge.launch.analyse import AnalyseConfig
from crysforge.launch.cluster.planning.suite import SuitePlan
from crysforge.launch.cluster.status import cancel, collect, statuses, table
from crysforge.launch.cluster.submission import Submission
from crysforge.launch.ensemble import EnsembleConfig
from crysforge.launch.evaluate import find
from crysforge.launch.export import ExportConfig
from crysforge.launch.leaderboard import LeaderboardConfig
from crysforge.launch.prepare import BakeEncodersConfig
from crysforge.trainer.base.command_line import PROSE, parse
from crysforge.trainer.base.tensors import save_tensors
from crysforge.trainer.jobs import finetuning as reports
from crysforge.trainer.jobs.schemas import FinetuneJob, pretrain_schema
from crysforge.trainer.reports.report import EvaluateConfig, evaluate
from crysforge.trainer.runs.card import share
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.model_directory import Exported, open_model, read_model
from crysforge.trainer.runs.saved import Checkpoint
from crysforge.trainer.serving.config import PredictConfig
from crysforge.trainer.serving.leaderboards import jarvis
from tests.evaluation_runs import arms_and_seeds, finetuned
from tests.exploits import PICKLES, Exploit
from tests.guarded import SECRET, Guard

DATA = Path(__file__).resolve().parent / "data"
SET, RUN = DATA / "schema-1" / "set", DATA / "schema-1" / "run"
MODEL = DATA / "schema-2" / "model"
SCHEMAS: list[Any] = [
    AnalyseConfig, BakeEncodersConfig, EnsembleConfig, EvaluateConfig, ExportConfig, FinetuneJob,
    InspectConfig, LeaderboardConfig, MergeConfig, PredictConfig, PrepareConfig, ReshardConfig,
    SubsetConfig, VerifyConfig, pretrain_schema(),
]  # fmt: skip


@dataclass
class Scene:
    """Where an attack takes place."""

    guard: Guard
    dice: random.Random
    number: int = 0

    def place(self, name: str) -> Path:
        """A new path in the box."""
        self.number += 1
        return self.guard.box / f"{self.number}-{name}"

    def copy(self, path: Path, name: str = "") -> Path:
        """A copy of a sample."""
        return Path(shutil.copytree(path, self.place(name or path.name)))

    def location(self) -> str:
        """A command, or an address with a secret in it."""
        command, port = self.guard.command, self.dice.randrange(1024, 65536)
        return self.dice.choice(
            [
                f"pipe:{command}",
                f"pipe:sh -c '{command}' {{}}",
                f"http://127.0.0.1:{port}/${{oc.env:CRYSFORGE_TEST_SECRET}}/{{}}",
                f"http://127.0.0.1:{port}/{SECRET}",
                f"s3://127.0.0.1/{SECRET}",
                f"simplecache::http://127.0.0.1:{port}",
                f"filecache::file://{self.guard.outside}",
                f"ftp://127.0.0.1:{port}/x",
            ]
        )


def refused(words: str, call: Callable[..., Any], *args: Any, **more: Any) -> None:
    """It ends with one line that has these words, after nothing was done."""
    try:
        call(*args, **more)
    except (ValueError, OSError) as error:
        text = str(error)
        assert words in text, f"{words!r} is not in {text!r}"
        assert "\n" not in text, text
    else:
        raise AssertionError(f"nothing was refused ({words})")


# --- code and addresses ---------------------------------------------------------------------------


def report_of(root: Path, **settings: Any) -> str:
    config = EvaluateConfig(
        suite=str(root), figures=False, space_groups=False, resamples=10, **settings
    )
    return (evaluate(find(root), config).path / "report.md").read_text()


def run_names_its_data(scene: Scene) -> None:
    root = arms_and_seeds(scene.place("suite"), {"none": 0.2, "a": 0.1}, seeds=(0, 1))
    location = scene.location()
    for run in root.glob("*/config.yaml"):
        own = {"data": location, "init_from": run.parent.name.partition("-")[0]}
        run.write_text(json.dumps(json.loads(run.read_text()) | own))
    if scene.dice.random() < 0.5:
        (root / "suite.json").unlink()  # then it is a folder of runs
    settings = scene.dice.choice(
        [{}, {"data_dir": "s3://bucket"}, {"data_dir": "http://127.0.0.1"}]
    )
    assert "not opened unless you say so" in report_of(root, **settings)


def config_names_a_place(scene: Scene) -> None:
    schema = scene.dice.choice(SCHEMAS)
    shown = (*PROSE, "metadata")
    fields = [f for f in dataclasses.fields(schema) if f.name not in shown]
    chosen = scene.dice.choice(
        [f.name for f in fields if "str" in str(f.type) or "dict" in str(f.type)]
    )
    location = scene.location()
    kind = next(str(f.type) for f in fields if f.name == chosen)
    value: Any = [location] if "list" in kind else {"x": location} if "dict" in kind else location
    path = scene.place("config.yaml")
    path.write_text(yaml.safe_dump({chosen: value}))
    words = "refers to values elsewhere" if "${" in location else "opened only if it is typed"
    refused(words, parse, schema, None, ["--config", str(path)])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(yaml.safe_dump({chosen: value}) + "\n")  # not what was recorded
    refused(words, parse, schema, None, ["--config", str(path), f"--recorded={digest}"])


def config_asks_the_environment(scene: Scene) -> None:
    text = scene.dice.choice(
        ["${oc.env:CRYSFORGE_TEST_SECRET}", "a/${env:HOME}", "${oc.decode:1}", "${seed}", "${.x}"]
    )
    shared = {"data": text, "encoder": {"name": text}, "loader": {"cache_dir": text}}
    key = scene.dice.choice(list(shared))
    path = scene.place("config.yaml")
    path.write_text(yaml.safe_dump({key: shared[key]}))
    refused("refers to values elsewhere", parse, FinetuneJob, None, [f"--config={path}"])
    root = scene.copy(MODEL)
    model = yaml.safe_load((root / "config.yaml").read_text())
    model[scene.dice.choice(["encoder", "settings"])][scene.dice.choice(["width", "head"])] = text
    (root / "config.yaml").write_text(yaml.safe_dump(model))
    refused("refers to values elsewhere", load, root)


def suite_puts_a_place_together(scene: Scene) -> None:
    location = f"pipe:{scene.guard.command}"
    half = scene.dice.randrange(1, len(location))
    suite: dict[str, Any] = {
        "output": str(scene.place("runs")), "data": {"a": {"source": "x"}}, "skip_missing": True,
        "settings": {"data": "a", "target": "t", "encoder.name": "cgcnn"},
        "factors": {"seed": [0]},
    }  # fmt: skip
    way = scene.dice.choice(["path", "data_dir", "parts", "factor", "include"])
    if way == "path":
        name = scene.dice.choice(["a", "source", "title", "metadata"])
        suite["data"][name] = {"path": location}
        suite["settings"]["data"] = name
    elif way == "data_dir":
        suite["data_dir"] = location
    elif way == "parts":
        suite["factors"] = {"one": {location[:half]: {}}, "two": {location[half:]: {}}}
        suite["settings"]["loader.cache_dir"] = "{one}{two}"
    elif way == "factor":
        suite["factors"]["data"] = [location]
    path = scene.place("suite.yaml")
    if way == "include":
        suite["include"] = [path.name]
    path.write_text(yaml.safe_dump(suite))
    try:
        runs = SuitePlan([str(path)], []).runs
    except ValueError as error:
        assert "\n" not in str(error).split("data sets are missing")[0]
    else:
        assert not [c for c in runs if "pipe:" in json.dumps(c.config)]


def pickle_in_place_of(scene: Scene) -> None:
    exploit = Exploit(scene.guard.outside / "unpickled")
    dump = scene.dice.choice(PICKLES)
    if scene.dice.random() < 0.4:
        root, call = scene.copy(MODEL), load
    elif scene.dice.random() < 0.5:
        root, call = scene.copy(SET), lambda path: Dataset.open(path)
    else:
        root, call = scene.copy(RUN), lambda path: RunDirectory(path).latest("vae")
    names = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix not in (".md", ".tar")]
    names = [p for p in names if call is load or p.name != "config.yaml"]
    victim = scene.dice.choice(names)
    dump(exploit, victim)
    if victim.name == "run.json":
        refused("run.json is not", lambda: RunDirectory(root).read())
    else:
        refused("", call, root)


# --- fields ---------------------------------------------------------------------------------------


def manifest_names_a_file(scene: Scene) -> None:
    root, cache = scene.copy(SET), scene.place("cache")
    manifest = json.loads((root / "manifest.json").read_text())
    outside = scene.guard.outside
    field_, value = scene.dice.choice(
        [
            ("bytes", str(outside / "thesis")), ("sha256", "backup"), ("sha256", "../" * 20 + "x"),
            ("name", f"../{outside.name}/notes.tar"), ("name", str(outside / "train-000000.tar")),
            ("bytes", -1), ("bytes", 1.5), ("count", 10**30), ("split", "../train"),
        ]
    )  # fmt: skip
    for shard in manifest["shards"]:
        shard[field_] = value
        if field_ == "bytes" and isinstance(value, str):
            shard["sha256"] = "backup"
    (root / "manifest.json").write_text(json.dumps(manifest))
    refused("manifest.json is damaged: shards[0]", Dataset.open, root, Access(cache_dir=str(cache)))


def paths_lead_out(scene: Scene) -> None:
    outside = scene.guard.outside
    way = scene.dice.choice(["suite", "link", "stage", "ensemble", "submission", "run", "board"])
    out = scene.dice.choice(["../../outside", str(outside), "a/../../../outside"])
    if way in ("suite", "link"):
        root = arms_and_seeds(scene.place("suite"), {"none": 0.2, "a": 0.1}, seeds=(0,))
        record = json.loads((root / "suite.json").read_text())
        if way == "link":
            (root / "away").symlink_to(outside)
            out = "away"
        record["runs"]["none-0"]["path"] = out
        write_json(root / "suite.json", record)
        refused("suite.json is damaged" if way == "suite" else "leads out of", find, root)
    elif way == "stage":
        root = scene.copy(RUN)
        write_json(root / "run.json", {"finished": [out]})
        refused("the name of a stage", open_model, root)
    elif way == "ensemble":
        root = scene.place("ensemble")
        root.mkdir()
        for i in range(2):
            (root / str(i)).symlink_to(outside)
        write_json(root / "ensemble.json", {"schema": 1, "members": 2, "scale": [1.0]})
        refused("leads out of", load, root)
    elif way in ("submission", "run"):
        folder = submission(scene, "a" if way == "submission" else out, out, "1")
        refused("submission.json is damaged", Submission.find, folder)
    else:
        run = finetuned(scene.place("run"), 0.1, config={"data": "d"})
        metrics = json.loads((run / "metrics.json").read_text())
        write_json(run / "metrics.json", {**metrics, "targets": [f"{out}/gap"]})
        about = dict.fromkeys(("model_name", "team_name", "project_url", "author_email"), "x")
        refused("is no field of JARVIS", jarvis, [run], scene.place("out"), about)


def submission(scene: Scene, name: str, output: str, id: str) -> Path:
    """A folder of a submission that a stranger made."""
    folder = scene.place("runs.submit")
    folder.mkdir()
    ids = {"cluster": "slurm", "time": 1, "code": "code-1", "commit": "", "ids": {name: id}}
    record = {"schema": 1, "job": "finetune", "history": [ids]}
    output = output if output.startswith("/") else f"../{output}"
    record["runs"] = {name: {"output": output, "values": {}, "job": "finetune"}}
    write_json(folder / "submission.json", record)
    return folder


def jobs_that_are_options(scene: Scene) -> None:
    id = scene.dice.choice(["--user=root", "1 --all", "-1", "1;2", "all", "../../x", "1,2", "*"])
    folder = submission(scene, "a", "runs/a", id)
    for call in (cancel, statuses, collect):
        refused("ids.a must be the id of a job", call, folder)


def checkpoint_without_hashes(scene: Scene) -> None:
    run = RunDirectory(scene.place("run"))
    run.start("a: 1\n", {}, "auto")
    tensors = {"w": torch.zeros(2)}
    path = run.save(Checkpoint("vae", 1, {}, tensors, tensors), keep=1)
    hashes = json.loads((path / "COMPLETE").read_text())
    name = scene.dice.choice(["model", "optimizer", "best", "average"])
    save_tensors(path / f"{name}.safetensors", {"w": torch.ones(2)})
    left = {k: v for k, v in hashes.items() if k != f"{name}.safetensors"}
    marker = scene.dice.choice(["", "{}", "null", json.dumps(left), json.dumps(hashes), "{", "[]"])
    (path / "COMPLETE").write_text(marker)
    refused("", run.load, path)


def links_in_a_run(scene: Scene) -> None:
    root = scene.copy(RUN)
    folders = ["checkpoints", "events", "vae", "checkpoints/x"]
    victim = scene.dice.choice([*folders, "run.json", "config.yaml", "owner.json"])
    target = scene.guard.outside if victim in folders else scene.guard.secret
    shutil.rmtree(root / "checkpoints", ignore_errors=victim == "checkpoints")
    (root / victim).parent.mkdir(exist_ok=True)
    (root / victim).unlink(missing_ok=True)
    (root / victim).symlink_to(target)
    run = RunDirectory(root)
    identity = json.loads((RUN / "run.json").read_text())["identity"]
    words = "is a symbolic link" if victim != "run.json" else "link out of"
    refused(words, run.start, "a: 1\n", identity, "auto")


def links_in_a_suite(scene: Scene) -> None:
    """Where its report goes, and where a submission writes."""
    if scene.dice.random() < 0.5:
        root = arms_and_seeds(scene.place("suite"), {"none": 0.2, "a": 0.1}, seeds=(0, 1))
        (root / "report").symlink_to(scene.guard.outside)
        refused("leads out of", report_of, root)
        return
    folder = submission(scene, "a", "runs/a", "1")
    part = scene.dice.choice(["cells", "logs", "events", "events/a", "code-2", "logs/1_0_log.out"])
    (folder / part).parent.mkdir(exist_ok=True)
    (folder / part).symlink_to(scene.guard.outside)

    def submit() -> None:
        found = Submission.read(folder)
        with found.alone():
            found.add("b", str(folder.parent / "b"), {}, {})
            found.snapshot()

    refused("is a symbolic link", submit)


def shared_cache(scene: Scene) -> None:
    directory = scene.place("cache")
    directory.mkdir()
    directory.chmod(scene.dice.choice([0o777, 0o775, 0o1777]))
    access = Access(cache_dir=str(directory), tries=1)
    data = Dataset.open(SET, access)
    shard = data.manifest.shards[0]
    entry = f"{shard.bytes}-{shard.sha256}"
    way = scene.dice.choice(["replaced", "altered", ".tar", ".partial", "lock", "pipe"])
    before = [c.id for _, c in data.read(range(16)) if not isinstance(c, BadCrystal)]
    copy = directory / f"{entry}.tar"
    if way in ("replaced", "altered"):
        content = bytearray(copy.read_bytes())
        content[scene.dice.randrange(len(content))] ^= 1 << scene.dice.randrange(8)
        if way == "replaced":
            copy.unlink()
        copy.write_bytes(content)
    elif way == "pipe":
        copy.unlink()
        os.mkfifo(copy)
    else:
        copy.unlink()
        planted = directory / ("lock" if way == "lock" else f"{entry}{way}")
        planted.unlink(missing_ok=True)
        planted.symlink_to(scene.guard.outside / "thesis-backup.tar")
    try:
        after = [c.id for _, c in data.read(range(16)) if not isinstance(c, BadCrystal)]
    except ValueError as error:
        assert "tampers" in str(error) and "\n" not in str(error)
    else:
        assert after == before
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == shard.sha256


def no_regular_files(scene: Scene) -> None:
    root = scene.copy(scene.dice.choice([SET, MODEL]))
    victim = scene.dice.choice(sorted(root.iterdir()))
    victim.unlink()
    if scene.dice.random() < 0.5:
        os.mkfifo(victim)
    elif victim.suffix != ".tar" and root.name.endswith("model"):
        victim.symlink_to(scene.guard.secret)
    else:
        victim.mkdir()
    with_card = victim.name == "README.md"  # nobody reads it
    if root.name.endswith("model"):
        load(root) if with_card else refused("", load, root)
    else:
        refused("", lambda: list(Dataset.open(root).read(range(24))))


# --- text -----------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|'/C calc'!A0", "'=1", "＝1"]
MARKUP = [
    "<script>alert(1)</script>", "![x](http://e.vil/i.png)", "[x](javascript:alert(1))",
    "<img src=x>", "a | b", "`` ` ``", "**b** _i_ ~~s~~", "\n\n# Title\n\n", "```\n<b>\n```",
    "<!-- x", "&lt;b&gt;",
    "\x1b[2J", "\u202etxt", "<http://e.vil>", "[a]: http://e.vil", "$x$ $y$", "| - |", "\\<b>",
]  # fmt: skip


def formulas_in_tables(scene: Scene) -> None:
    ids = [*scene.dice.sample(FORMULAS, 4), "plain", "-1.5", "a,b"]
    names = scene.dice.sample([f for f in FORMULAS if f.isprintable()], 2)
    path = scene.place("predictions_test.csv")
    values = np.array([[-1.0, 2.0]] * len(ids))
    reports.write_predictions(path, names, ids, values, values)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    for cell in (cell for row in rows for cell in row):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝")) or is_number(cell), cell
    from crysforge.datapipe.common.tables import read_rows

    back = list(read_rows(path))
    assert [row["id"] for row in back] == ids
    assert [row[f"target_{names[0]}"] for row in back] == ["-1"] * len(ids)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Tags(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(" ".join([tag, *(f"{k}={v}" for k, v in attrs if k in ("href", "src"))]))

    def handle_comment(self, data: str) -> None:
        self.tags.append(f"comment {data}")


def shape(text: str) -> list[str]:
    """What a page of Markdown consists of."""
    page = markdown.markdown(text.partition("\n---\n")[2] or text, extensions=["extra"])
    return [t for t in Tags(page).tags if t not in ("code", "em", "strong")]


def markup_in_a_card(scene: Scene) -> None:
    bad, plain = scene.dice.choice(MARKUP), "plain"
    cards = []
    for word in (plain, bad):
        root = scene.copy(MODEL)
        config = yaml.safe_load((root / "config.yaml").read_text())
        line = " ".join(word.split()) if word.isprintable() else ascii(word)
        config["data"]["provenance"] = {"source": word, word: {"name": word}}
        config["data"]["targets"] = {line: next(iter(config["data"]["targets"].values()))}
        config["targets"] = [line]
        config["versions"] = {line: line}
        (root / "config.yaml").write_text(yaml.safe_dump(config))
        scaler = json.loads((root / "scaler.json").read_text())
        write_json(root / "scaler.json", {**scaler, "targets": [line], "units": [line]})
        exported: Exported = read_model(root)
        output = share(exported, scene.place("shared"))
        cards.append((output / "README.md").read_text())
    assert shape(cards[0]) == shape(cards[1]), bad


def markup_in_a_report(scene: Scene) -> None:
    bad = " ".join(scene.dice.choice([m for m in MARKUP if m.isprintable()]).split())
    texts = []
    for word in ("plain", bad):
        root = arms_and_seeds(
            scene.place("suite"), {"none": 0.2, "a": 0.1}, seeds=(0, 1), unit=word, data=word
        )
        record = json.loads((root / "suite.json").read_text())
        record["title"] = word
        record["factors"].append(word)
        for run in record["runs"].values():
            run["values"][word] = word if run["values"]["seed"] else 1
        record["runs"] = {f"{word} {k}": v for k, v in record["runs"].items()}
        record["runs"][f"{word} gone"] = {
            "path": "gone", "job": "finetune", "values": {"pretraining": word, "seed": 0, word: 1},
        }  # fmt: skip
        write_json(root / "suite.json", record)
        texts.append([t for t in shape(report_of(root)) if t not in ("tr", "td", "th")])
    links = [{t for t in text if t.startswith(("a ", "img "))} for text in texts]
    kinds = [{t.split()[0] for t in text} for text in texts]
    assert links[0] == links[1] and kinds[0] == kinds[1], bad


def names_that_are_paths(scene: Scene) -> None:
    """Targets become names of figures."""
    name = scene.dice.choice(["../../../outside/x", "a/b", "..", "x" * 400, "a:b*?"])
    from crysforge.trainer.serving.ensemble import MemberPredictions, _report

    path = scene.place("ensemble")
    path.mkdir()
    rng = np.random.default_rng(0)
    found = {"val": MemberPredictions(["a", "b", "c"], rng.random((3, 2)), rng.random((2, 3, 2)))}
    _report(path, found, np.ones(2), [name, "b"], ["eV", "$x$"])
    assert len(list(path.iterdir())) == 5


def terminal_codes(scene: Scene) -> None:
    """What a table of runs shows is on its lines."""
    run = scene.copy(RUN, "run")
    bad = scene.dice.choice(["\x1b[2J", "a\nfinished", "\u202e", "x" * 10_000, "\r"])
    write_json(run / "heartbeat.json", {"status": bad, "stage": "vae", "step": 1, "total": 2})
    (run / "events").mkdir()
    event = {"event": "start", "rank": 0, "ranks": 1, "host": bad, "device": bad, "gpu": bad}
    (run / "events" / "rank-0000.jsonl").write_text(json.dumps(event) + "\n")
    metrics = {"units": {"a": bad}, "test": {"mae": 1.0}, "targets": ["a"]}
    write_json(run / "metrics.json", metrics)
    line = {"stage": "vae", "step": 10**30, "train/loss": bad}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = table(statuses(run))
    assert text.replace("\n", "").isprintable() and len(text.splitlines()) == 3, text


@dataclass(frozen=True)
class Attack:
    """A row of the table in docs/security.md."""

    name: str
    mount: Callable[[Scene], None] = field(compare=False)


ATTACKS = [
    Attack("a run names a command or address as its data", run_names_its_data),
    Attack("a config file names a command or address, in any setting", config_names_a_place),
    Attack("a config or model refers to the environment", config_asks_the_environment),
    Attack("a suite puts a command together from parts", suite_puts_a_place_together),
    Attack("a pickle in place of any file", pickle_in_place_of),
    Attack("a manifest's sizes, hashes and names are paths", manifest_names_a_file),
    Attack("suites, runs, ensembles, submissions lead elsewhere", paths_lead_out),
    Attack("job ids are options of Slurm's commands", jobs_that_are_options),
    Attack("a checkpoint is altered, and its marker emptied", checkpoint_without_hashes),
    Attack("links in a run that is continued", links_in_a_run),
    Attack("links in a suite or submission that is gone on with", links_in_a_suite),
    Attack("copies and links in a cache that others write to", shared_cache),
    Attack("pipes, links and directories in place of files", no_regular_files),
    Attack("ids and names are formulas of a spreadsheet", formulas_in_tables),
    Attack("markup in a model's names, units, provenance", markup_in_a_card),
    Attack("markup in a suite's names, factors, units", markup_in_a_report),
    Attack("targets are paths of figures", names_that_are_paths),
    Attack("a run's log has codes of the terminal", terminal_codes),
]


def mount(attack: Attack, guard: Guard, seed: int) -> str:
    """One try of an attack: what got through, or nothing."""
    scene = Scene(guard, random.Random(f"{attack.name} {seed}"))
    for left in guard.box.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    (guard.box / "tmp").mkdir()
    try:
        with guard.armed():
            attack.mount(scene)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""
