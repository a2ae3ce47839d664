"""All ordered pairs of atoms inside the crystals of a packed batch, and a bilinear head on them.

Letters in shapes: A atoms, B crystals, P pairs (n² for a crystal of n atoms, an atom with itself
among them), D channels, C classes. The pairs of a crystal lie together, those of its first atom
with all others first. `sizes` are B numbers, the atoms of each crystal, known to the host: where
they are None they are read from `ptr` [B+1], for which a GPU is waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pair_products(
    left: Tensor, right: Tensor, ptr: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """left_i · right_j for all pairs of each crystal, [P, C] from left [A, C, D] and right [A, D].

    Crystals of equal size are one batched product: nothing of shape [P, D] exists, nothing is
    padded.
    """
    sizes = ptr.diff().tolist() if sizes is None else sizes
    each, total = ptr.diff(), sum(n * n for n in sizes)
    atoms = torch.argsort(torch.repeat_interleave(each, each, output_size=len(left)), stable=True)
    left, right = left[atoms], right[atoms]
    runs = [(n, len(list(run))) for n, run in itertools.groupby(sorted(sizes))]
    lengths = [n * crystals for n, crystals in runs]
    blocks = []
    # One split: its backward is one concatenation, where slices would each fill a whole gradient.
    for (n, crystals), rows, columns in zip(
        runs, left.split(lengths), right.split(lengths), strict=True
    ):
        product = rows.reshape(crystals, -1, rows.shape[2]) @ columns.view(crystals, n, -1).mT
        blocks.append(product.view(crystals, n, -1, n).transpose(2, 3).reshape(-1, left.shape[1]))
    pairs = torch.argsort(
        torch.repeat_interleave(each, each * each, output_size=total), stable=True
    )
    products = torch.cat(blocks)
    return torch.empty_like(products).index_copy(0, pairs, products)


class PairClassifier(nn.Module):
    """Classes of pairs of atoms: a bilinear form per class, then a linear layer over classes
    (CrysXPP's and CrysGNN's connectivity decoder). Computes in fp32."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim, dim))
        self.bias = nn.Parameter(torch.empty(classes))
        self.mix = nn.Parameter(torch.empty(classes, classes))
        self.mix_bias = nn.Parameter(torch.empty(classes))
        for parameter, inputs in (
            (self.weight, dim),
            (self.bias, dim),
            (self.mix, classes),
            (self.mix_bias, classes),
        ):
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def forward(self, atoms: Tensor, ptr: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities [P, C] from the atoms' latents [A, D]."""
        with torch.autocast(atoms.device.type, enabled=False):
            x = atoms.float()
            classes, dim = self.weight.shape[:2]
            # The layer over classes goes into the bilinear forms: C·D² instead of P·C² products.
            weight = torch.einsum("oc,cij->ioj", self.mix.float(), self.weight.float())
            bias = self.mix.float() @ self.bias.float() + self.mix_bias.float()
            left = (x @ weight.flatten(1)).view(-1, classes, dim)
            return F.log_softmax(pair_products(left, x, ptr, sizes) + bias, dim=1)
