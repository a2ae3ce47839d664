"""What all ranks of a job must have alike, compared before they train together.

Ranks that differ would train something that nobody asked for, or wait for each other. A hash of
each rank's facts goes to rank 0; only where hashes differ do facts follow, and the error names the
fact, its values and the ranks. Alone, without a meeting, there is nothing to compare.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.common.safe_read import parse_json
from crysforge.trainer.base.rendezvous import Rendezvous
from crysforge.trainer.base.store import span

LAG_S = 90.0
"""Seconds that a shared file system may take to show on one machine what another one wrote."""
ROUNDING = 1e-4
"""Most that initial weights may differ, relative to a tensor's largest: kinds of processors draw
the same numbers with other rounding."""
_SHOWN, _GROUPS = 4, 16


def agree(meeting: Rendezvous | None, facts: Mapping[str, Any]) -> None:
    """Returns if all ranks have these facts (JSON values). All ranks call it.

    Raises:
        ValueError: on every rank, the same: what differs, its values and the ranks.
    """
    if meeting is None:
        return
    text = json.dumps(dict(facts), sort_keys=True, default=str)
    everyone = range(meeting.size)
    digests = meeting.gather(hashlib.sha256(text.encode()).hexdigest(), everyone)
    groups: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest, []).append(rank)
    first = meeting.share([ranks[0] for ranks in groups.values()][:_GROUPS])
    if len(first) == 1:
        return
    own = json.dumps({"host": socket.gethostname(), "facts": text})
    details = [parse_json(found, "what a rank says") for found in meeting.gather(own, first)]
    found = [
        (ranks, detail["host"], parse_json(detail["facts"], "what a rank says"))
        for ranks, detail in zip(groups.values(), details, strict=False)
    ]
    raise ValueError(meeting.share(difference(found) if found else None))


def difference(groups: list[tuple[list[int], str, dict[str, Any]]]) -> str:
    """A line on what differs between groups of ranks: the ranks, a host of theirs, their facts."""
    parts = []
    for key in sorted({key for _, _, facts in groups for key in facts}):
        values: dict[str, list[int]] = {}
        hosts: dict[str, str] = {}
        for ranks, host, facts in groups:
            value = json.dumps(facts[key]) if key in facts else "missing"
            values.setdefault(value, []).extend(ranks)
            hosts.setdefault(value, host)
        if len(values) > 1:
            columns = enumerate(zip(*values, strict=False))
            same = next((i for i, column in columns if len(set(column)) > 1), 0)
            each = (f"{_cut(v, same)} on {span(sorted(values[v]))} ({hosts[v]})" for v in values)
            parts.append(f"{key}: {', '.join(each)}")
    more = f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return (
        f"the ranks of this job disagree: {'; '.join(parts[:_SHOWN])}{more}: start all of them "
        "with the same command, data, code and environment"
    )


def _cut(text: str, same: int, width: int = 80) -> str:
    """A long text from a little before where it differs."""
    start = max(0, min(same - 20, len(text) - width))
    return f"{'…' * (start > 0)}{text[start : start + width]}{'…' * (start + width < len(text))}"


@torch.no_grad()
def same_weights(meeting: Rendezvous | None, module: nn.Module, device: torch.device) -> bool:
    """Makes sure that all ranks start from the same weights. Where they differ by rounding, all
    take rank 0's. Needs the process group.

    Returns:
        Whether they differed.

    Raises:
        ValueError: on every rank: they are other weights.
    """
    if meeting is None:
        return False
    state, everyone = module.state_dict(), range(meeting.size)
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digests = meeting.gather(digest.hexdigest(), everyone)
    if meeting.share(len(set(digests)) == 1):
        return False
    agree(meeting, {f"the shape of {k}": [str(v.dtype), *v.shape] for k, v in state.items()})
    other = ""
    for name, own in state.items():
        theirs = own.to(device, torch.float64, copy=True)
        dist.broadcast(theirs, 0)
        theirs = theirs.to(own.device)
        far = (own - theirs).abs() > ROUNDING * theirs.abs().max() if own.numel() else own
        if not other and bool(far.any()):
            other = name
        own.copy_(theirs)
    agree(meeting, {"the first weights": f"others in {other}" if other else "as on rank 0"})
    return True


def same_file(meeting: Rendezvous | None, path: Path) -> None:
    """Waits until this rank sees a file as rank 0 does, for shared file systems that lag.

    Raises:
        ValueError: it never does.
    """
    if meeting is None:
        return
    digest = meeting.share(sha256(path) if meeting.rank == 0 else None)
    end = time.monotonic() + min(LAG_S, meeting.timeout_s)
    while _digest(path) != digest:
        meeting.check()
        if time.monotonic() > end:
            raise ValueError(
                f"{meeting.name} does not see {path} as rank 0 has written it: run_dir must be on "
                "a file system that all hosts share, at the same place"
            )
        time.sleep(0.2)


def _digest(path: Path) -> str:
    with suppress(OSError):
        return sha256(path)
    return ""
