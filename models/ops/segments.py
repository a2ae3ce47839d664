"""Operations on packed graphs: gathers, segment sums, neighbour softmax, readout.

Every gather and every segment sum is a product with a sparse matrix of ones or multiplicities
whose transpose is known, so the backward pass is a segment sum too: no atomics, bit-equal reruns.
What is here is the definition and the path on CPU; GPUs take the Triton twins in `models.kernels`.

Letters in shapes: A atoms, N nodes, E edges, B crystals, R rows of the edge features, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crysforge.datapipe.schema import CrystalBatch
from crysforge.models.ops.dispatch import Op
from crysforge.models.ops.edges import Edges, Incidence, RowSum
from crysforge.models.ops.precision import full_precision


@Op
def gather_sum(table: Tensor, edges: Edges) -> Tensor:
    """What an edge sees, [E, D]: the sum of its target's, its source's and its feature's row.

    `table` [2N+R, D] holds N rows for targets, N for sources, R for features. With the blocks of
    a weight matrix applied to nodes and features beforehand, this is the matrix applied to the
    concatenation [x_target; x_source; feature], at the cost of a gather.
    """
    return edges.gather(table)


@Op
def gather_source(x: Tensor, edges: Edges) -> Tensor:
    """Source node's row of x [N, D] for every edge, [E, D]."""
    return edges.from_source(x)


@Op
def gather_target(x: Tensor, edges: Edges) -> Tensor:
    """Target node's row of x [N, D] for every edge, [E, D]."""
    return edges.from_target(x)


@Op
def segment_sum(messages: Tensor, edges: Edges) -> Tensor:
    """Sum over the edges into each node, with multiplicities: [E, D] → [N, D]."""
    return edges.into(messages)


@Op
def segment_softmax(scores: Tensor, edges: Edges) -> Tensor:
    """Softmax over the edges into each node, [E, D] → [E, D], in fp32 or wider. An edge that
    stands for c equal ones has the weight of one of them: Σ c · softmax = 1."""
    scores = full_precision(scores)
    top = scores.new_full((edges.num_nodes, scores.shape[1]), -torch.inf)
    index = edges.target[:, None].expand_as(scores)
    top = top.scatter_reduce(0, index, scores.detach(), "amax")
    exp = torch.exp(scores - top[edges.target])
    return exp / gather_target(segment_sum(exp, edges), edges)


@Op
def mean_readout(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Mean over the atoms of each crystal from node rows x [N, D], [B, D], in fp32 or wider."""
    x = full_precision(x)
    atoms = batch.ptr.diff().to(x.dtype)
    share = batch.node_multiplicity.to(x.dtype) / atoms[batch.node_batch]
    each = torch.arange(len(x) + 1, device=x.device)
    return Incidence(
        RowSum(each[:-1], batch.node_ptr, share), RowSum(batch.node_batch, each, share, each=1)
    )(x)


def crystal_mean(x: Tensor, ptr: Tensor) -> Tensor:
    """Mean over the atoms of each crystal, [A, D] → [B, D]."""
    return torch.segment_reduce(x, "mean", offsets=ptr)
