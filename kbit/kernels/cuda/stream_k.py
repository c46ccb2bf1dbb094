"""How the kernels that include `stream_k.h` share out their tiles: whole ones, or cut along the sum."""

from __future__ import annotations

import dataclasses
import itertools
import secrets

TILE = 256  # features a cluster of two thread blocks
STEP = 64  # of the sum
# What it costs to leave sums in memory and to add them, in steps (measured on one H200 at 256 tokens a tile).
_CUT_STEPS = 16
_CUT_WAVES = 0.06  # shares begin at different places of the sum, which L2 serves worse: not for less than this
_LEAST_STEPS = 8  # fewer are not worth a cluster's start

# What marks a thread block's sums as written. Flags lie in memory that nobody cleared, so no two launches may use the
# same mark, and one that lies there by chance must be out of the question.
launches = itertools.count(secrets.randbits(62) | 1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """clusters: how many start; shared_tiles: tiles cut along the sum, so that every cluster has the same work."""

    clusters: int
    shared_tiles: int

    def workspace(self, tokens: int) -> tuple[int, int]:
        """(bytes of memory for unfinished sums of tiles of so many tokens, where in it the flags begin)."""
        sums = self.clusters * TILE * tokens * 4
        # A flag for each of a cluster's four warpgroups.
        return (sums + self.clusters * 32, sums) if self.shared_tiles else (0, 0)


def tokens_a_tile(m: int) -> int:
    """As few tiles of at most 256 tokens as cover m, of one size; a multiple of 32, at least 64."""
    tiles = -(-m // 256)
    return max(64, -(-m // tiles // 32) * 32)


def schedule(processors: int, m: int, features: int, reduction: int, nt: int) -> Schedule:
    """Cut tiles where whole ones leave the busiest cluster more idle steps in the last wave than cutting costs."""
    tiles = -(-features // TILE) * -(-m // nt)
    clusters, steps = processors // 2, -(-reduction // STEP)
    waves = -(-tiles // clusters)
    idle = waves - tiles / clusters
    if idle * steps <= _CUT_STEPS or idle <= _CUT_WAVES * waves:
        return Schedule(max(1, min(clusters, tiles)), 0)
    if 2 * tiles <= clusters:  # as many parts of each tile as there are clusters for; each worth its start
        return Schedule(max(1, min(clusters // tiles, steps // _LEAST_STEPS)) * tiles, tiles)
    shared = tiles - max(0, waves - 2) * clusters
    return Schedule(max(1, min(clusters, shared * steps // _LEAST_STEPS)), shared)
