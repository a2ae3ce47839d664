"""Graphs written straight from their definitions: explicit loops over images, and the literal sets
of the published recipe."""

from __future__ import annotations

import itertools
import math

import numpy as np

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.schema import GraphSpec


def cell(lengths, angles) -> np.ndarray:
    """Lattice rows from lengths in Å and angles in degrees."""
    (a, b, c), (alpha, beta, gamma) = lengths, np.radians(angles)
    x = math.cos(beta)
    y = (math.cos(alpha) - math.cos(beta) * math.cos(gamma)) / math.sin(gamma)
    z = math.sqrt(1 - x * x - y * y)
    return np.array(
        [[a, 0, 0], [b * math.cos(gamma), b * math.sin(gamma), 0], [c * x, c * y, c * z]]
    )


def images_within(crystal: Crystal, radius: float):
    """Every (i, j, image, vector from i to the image of j) with a length up to radius, in plain
    loops; the planes between images tell how many are needed."""
    spacing = 1 / np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)
    reach = [range(-m, m + 1) for m in np.ceil(radius / spacing).astype(int) + 1]
    grid = np.array(list(itertools.product(*reach)))
    for i, start in enumerate(crystal.frac_coords):
        for j, end in enumerate(crystal.frac_coords):
            vectors = (end + grid - start) @ crystal.lattice
            for k in np.flatnonzero(np.linalg.norm(vectors, axis=1) <= radius):
                yield i, j, tuple(int(m) for m in grid[k]), vectors[k]


def lists_with(crystal: Crystal, count: int, least: float):
    """Per atom, all (length, j, image) within a radius that holds `count` others of each."""
    radius = max(least + 0.01, 3.0)
    while True:
        lists = [[] for _ in range(len(crystal))]
        for i, j, image, vector in images_within(crystal, radius):
            if (i, image) != (j, (0, 0, 0)):
                lists[i].append((float(np.linalg.norm(vector)), j, image))
        # Counted a little inside the radius, so that no tie of the last one is beyond it.
        if min(sum(0.15 <= e[0] < radius - 0.01 for e in entries) for entries in lists) >= count:
            return [sorted(entries) for entries in lists]
        radius *= 1.5


def shortest_triple(lattice: np.ndarray):
    """Three shortest independent lattice vectors, the ties by image."""
    radius = np.linalg.norm(lattice, axis=1).max() + 0.01
    point = Crystal("p", np.array([1]), np.zeros((1, 3)), lattice)
    found = [(round(np.linalg.norm(v), 6), m) for _, _, m, v in images_within(point, radius)]
    chosen: list = []
    for _, image in sorted(found)[1:]:
        if np.linalg.matrix_rank([*chosen, image]) == len(chosen) + 1:
            chosen.append(image)
    return chosen[:3]


def recipe(crystal: Crystal, spec: GraphSpec) -> list[tuple[int, int, np.ndarray]]:
    """The edge list (source, target, vector from source to target) as the published code makes
    it: a set of images per pair of atoms, each of which is emitted in both directions."""
    lattice_images = {
        "none": [],
        "matformer": [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)],
        "comformer": shortest_triple(crystal.lattice),
    }[spec.lattice_edges]
    sets: dict[tuple[int, int], set] = {}
    for i, entries in enumerate(lists_with(crystal, spec.neighbors or 0, spec.radius or 0)):
        entries = [e for e in entries if e[0] >= 0.15]
        limit = spec.radius if spec.radius else entries[spec.neighbors - 1][0]
        for length, j, image in entries:
            if length <= limit + spec.tie_tolerance:
                if j < i:
                    sets.setdefault((j, i), set()).add(tuple(-m for m in image))
                else:
                    sets.setdefault((i, j), set()).add(image)
        sets.setdefault((i, i), set())
    if spec.radius is not None or spec.own_images_once:
        # plain pairs: an image and its negative are one undirected edge
        for (i, j), images in sets.items():
            if i == j:
                sets[i, j] = {m for m in images if m > (0, 0, 0)}
    for (i, j), images in sets.items():
        if i == j:
            both = images | {tuple(-m for m in x) for x in images}
            images |= {tuple(m) for m in lattice_images} - both
    edges = []
    for (i, j), images in sets.items():
        for image in images:
            vector = (crystal.frac_coords[j] + image - crystal.frac_coords[i]) @ crystal.lattice
            edges += [(i, j, vector), (j, i, -vector)]
    return edges


def by_pair(sources, targets, values) -> dict[tuple[int, int], np.ndarray]:
    out: dict[tuple[int, int], list] = {}
    for s, t, v in zip(sources, targets, values, strict=True):
        out.setdefault((int(s), int(t)), []).append(np.asarray(v, dtype=float))
    return {pair: np.stack(v) for pair, v in out.items()}


def released(crystal: Crystal, k: int, images=()) -> list[tuple[int, int, np.ndarray]]:
    """The edge list as the released codes make it, ties cut by float64: the neighbours of every
    atom over a block of images, one image after another and with lengths summed up as in
    jarvis-tools; then the literal sets of images, and each in both directions."""
    lattice = np.ascontiguousarray(crystal.lattice)
    points = crystal.frac_coords @ lattice
    spacing = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    radius = 4.0
    while True:
        lists: list[list] = [[] for _ in points]
        reach = [np.arange(-m, m + 1.0) for m in np.ceil((radius + 0.15) / spacing) + 1]
        for image in itertools.product(*reach):
            z = ((np.dot(image, lattice) + points)[:, None, :] - points[None, :, :]) ** 2
            lengths = np.sum(z, axis=-1) ** 0.5
            for j, i in zip(*np.nonzero((lengths <= radius) & (lengths > 0.15)), strict=True):
                lists[i].append((lengths[j, i], int(j), tuple(int(m) for m in image)))
        if min(map(len, lists)) >= k:
            break
        radius = max(radius * 2, *np.linalg.norm(lattice, axis=1))
    sets: dict[tuple[int, int], set] = {}
    for i, entries in enumerate(lists):
        entries = sorted(entries, key=lambda e: e[0])
        for length, j, image in entries:
            if length <= entries[k - 1][0]:
                low = j < i
                pair, kept = ((j, i), tuple(-m for m in image)) if low else ((i, j), image)
                sets.setdefault(pair, set()).add(kept)
        sets.setdefault((i, i), set()).update(images)
    edges = []
    for (i, j), found in sets.items():
        for image in found:
            vector = (crystal.frac_coords[j] + image - crystal.frac_coords[i]) @ lattice
            edges += [(i, j, vector), (j, i, -vector)]
    return edges
