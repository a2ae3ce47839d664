"""Which atoms an encoder of given depth cannot tell apart: colour refinement over a packed batch.

Colour refinement (1-WL; Weisfeiler and Leman, 1968) on edges labelled with distance classes.
Two atoms that get the same colour after t rounds have equal features after t layers of any
network whose messages see only the two atoms' features and their distance. Colours are 64-bit
hashes; a sum of hashes stands for a multiset, so a round is one pass over the edges.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser on uint64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive(key: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """A new hash from a hash and a number, uint64 of broadcast shape."""
    return mix(key + (salt.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def refine(
    colour: np.ndarray,
    source: np.ndarray,
    shell: np.ndarray,
    count: np.ndarray,
    edge_ptr: np.ndarray,
    depth: int,
) -> np.ndarray:
    """Colours of all atoms after `depth` rounds, or fewer once a round splits none.

    Args:
        colour: [A] uint64 initial colours: whatever an encoder sees of an atom itself.
        source: [E] source atom of each edge; edges are sorted by target.
        shell: [E] distance class of each edge.
        count: [E] equal edges that each one stands for.
        edge_ptr: [A+1] first edge into each atom, then E.
        depth: rounds of message passing.
    """
    label, count = mix(shell.astype(np.uint64)), count.astype(np.uint64)
    total = np.zeros(len(source) + 1, dtype=np.uint64)
    distinct = len(np.unique(colour))
    for _ in range(depth):
        np.cumsum(mix(colour[source] + label) * count, out=total[1:])
        heard = total[edge_ptr]
        colour = mix(colour * _GOLDEN + (heard[1:] - heard[:-1]))
        before, distinct = distinct, len(np.unique(colour))
        if distinct == before:
            break
    return colour


def orbits(numbers: np.ndarray, row: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Colours [n] uint64 of the atoms of one crystal when no further round splits a class.

    Atoms of one colour hear equally many of each other colour over each distance. So whatever is
    given to whole colours, such as a mask, tells no two atoms of a colour apart at any depth. The
    colours belong to the atoms, in whatever order these are listed.

    Args:
        numbers: [n] atomic numbers.
        row: [n] distance row of each atom.
        edges: [4, e] target, source, distance class, count; sorted by target.
    """
    wide: np.ndarray = edges.astype(np.int64)
    target, source, shell, count = wide
    edge_ptr = np.searchsorted(target, np.arange(len(numbers) + 1))
    seed = derive(row.astype(np.uint64), numbers)
    return refine(seed, source, shell, count, edge_ptr, len(numbers))


def classes(colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First atom of each class [N], ascending, and the class of each atom [A] in that order."""
    _, first, of_atom = np.unique(colour, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[order] = np.arange(len(first))
    return first[order], rank[of_atom]
