"""Ranks that were not started alike, or of which one fails, all end with the reason and code 2."""

from __future__ import annotations

import re
import socket

import pytest
import torch

from crysforge.trainer.base import distributed
from crysforge.trainer.base.agreement import same_weights
from tests.distributed.ranks import run_ranks
from tests.distributed.test_guards import STEP, VAE

pytestmark = pytest.mark.distributed


@pytest.fixture
def start(server, data, tmp_path):
    """Starts a pretraining on two ranks in `tmp_path / "run"`."""

    def start(*args: str, **more):
        place = [f"data={data}", f"run_dir={tmp_path / 'run'}"]
        return server.run("pretrain", *VAE, *place, *args, ranks=2, **more)

    return start


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"own": {1: ["vae.lr=0.1"]}}, r"vae\.lr: 0\.003 on rank 0 \(.*\), 0\.1 on rank 1 \("),
        (
            {"faults": {0: {"at": "crysforge.trainer.runs.facts:metadata.version",
                            "do": 'answer "0.1"'}}},
            r'torch: "0\.1" on rank 0 \(.*\), "\d.*" on rank 1 \(',
        ),
        (
            {"faults": {1: {"at": "crysforge.trainer.runs.facts:code_version",
                            "do": 'answer {"sources": "c0de"}'}}},
            r'the code\'s sources: "\w{16}" on rank 0 \(.*\), "c0de" on rank 1 \(',
        ),
    ],
    ids=["a setting", "a library", "the code"],
)  # fmt: skip
def test_ranks_that_differ_train_nothing(start, tmp_path, more, words):
    ended = start(**more)
    assert ended.codes == [2, 2], ended.output
    lines = errors(ended.output)
    assert len(lines) == 2 and lines[0] == lines[1]
    assert re.search(words, lines[0]), lines[0]
    assert "Traceback" not in ended.output and not (tmp_path / "run").exists()


def test_paths_may_differ_and_data_may_not(start, data, tmp_path):
    """Hosts may have copies of their own; what is in them is compared."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    copy.symlink_to(data)
    ended = start(own={1: [f"data={copy}", "loader.workers=1"]})
    assert ended.codes == [0, 0], ended.output
    other.mkdir()
    for file in data.iterdir():
        text = file.read_bytes()
        if file.name == "manifest.json":
            text = re.sub(rb'"sha256": "\w{4}', b'"sha256": "0000', text, count=1)
        (other / file.name).write_bytes(text)
    ended = start(own={1: [f"data={other}"]})
    assert ended.codes == [2, 2], ended.output
    assert "the data's fingerprint: " in errors(ended.output)[0]


BEFORE = {"own": {0: ["data=/nowhere"]}, "words": "/nowhere is not a data set", "who": 0}
RUNS = "crysforge.trainer.runs"
CASES = {
    "rank 0, before they meet": BEFORE,
    "rank 1, before they meet": {**BEFORE, "own": {1: ["data=/nowhere"]}, "who": 1},
    "rank 0, as the run is claimed": {
        "faults": {0: {"at": f"{RUNS}.checkpoint:RunDirectory.start", "do": "fail no such thing"}},
        "words": "no such thing", "who": 0,
    },
    "rank 1, as the largest batch is tried": {
        "faults": {1: {"at": "crysforge.trainer.loop.fit:try_batch", "do": "fail it does not fit"}},
        "args": ["trainer.try_largest=true"], "words": "it does not fit", "who": 1,
    },
    "rank 1, in a step": {
        "faults": {1: {"at": STEP, "call": 2, "do": "fail too many bad crystals"}},
        "words": "too many bad crystals", "who": 1,
    },
    "rank 1, in a step, as rank 0 hangs": {
        "faults": {1: {"at": STEP, "call": 2, "do": "fail too many bad crystals"},
                   0: {"at": STEP, "call": 2, "do": "hang"}},
        "words": "too many bad crystals", "who": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_fails_ends_all_with_its_reason(start, name):
    case = dict(CASES[name])
    words, who = case.pop("words"), case.pop("who")
    ended = start(*case.pop("args", ()), **case)
    assert ended.codes == [2, 2], ended.output
    first, second = sorted(errors(ended.output), key=lambda line: f"rank {who} on" in line)
    assert first.startswith(f"error: {words}")
    assert re.match(rf"error: rank {who} on \S+: {words}", second), second
    assert "Traceback" not in ended.output


def test_a_port_that_is_taken_is_no_lost_rank(start):
    """And both ranks end long before their time-out, though they cannot reach each other."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = {"MASTER_PORT": str(other.getsockname()[1])}
        ended = start("trainer.timeout_s=5", environ={0: port, 1: port})
    assert ended.codes == [1, 1], ended.output
    assert "is taken, perhaps by another job: set MASTER_PORT" in ended.output
    assert "is not rank 0 of this job" in ended.output
    assert "lost the other ranks" not in ended.output


def weights(values: list[list[float]]) -> list:
    """On two ranks: what `same_weights` makes of linear layers that hold these values."""
    world = distributed.init()
    out: list = []
    for own in values:
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.data.fill_(own[world.rank])
        try:
            found = same_weights(world.meeting, layer, world.device)
            out.append([found, layer.weight.flatten().tolist()])
        except ValueError as error:
            out.append(str(error))
    group = torch.distributed.new_group()  # as DeepSpeed makes one
    out.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    distributed.shutdown()
    return out


def test_initial_weights_are_equal_or_differ_by_rounding():
    same, rounded, other = [1.5, 1.5], [1.5, 1.5 + 2**-20], [1.5, 1.51]
    results = run_ranks(
        "tests.distributed.test_disagreement:weights", 2, values=[same, rounded, other]
    )
    for result in results:
        assert result[:2] == [[False, [1.5, 1.5]], [True, [1.5, 1.5]]]
        assert 'the first weights: "as on rank 0" on rank 0' in result[2]
        assert '"others in weight" on rank 1' in result[2]
        assert result[3] == 1800.0
