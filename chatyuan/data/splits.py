"""Splits that share nothing: duplicates are clustered first, and a cluster is in one split.

The split of a cluster is a hash of its texts, so it does not change when other texts come or go.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from chatyuan.cleaning import dedup
from chatyuan.data.sources import hash_fraction
from chatyuan.text.normalize import fingerprint

__all__ = ["choose_split", "cluster", "fingerprint"]


def cluster(fingerprints: Sequence[str]) -> np.ndarray:
    """The cluster of each text, the index of its first member, int64 [texts].

    Members are connected by exact, near (shingle Jaccard >= .7) or contained (>= .8 of the shorter)
    duplicates; see `chatyuan.cleaning.dedup`.
    """
    return dedup.clusters(fingerprints, fingerprinted=True)


def choose_split(fingerprints: Collection[str], held_out: Mapping[str, float]) -> str:
    """The split of a cluster with these distinct texts.

    `held_out` maps a split to the share of clusters it gets; the rest is "train".
    """
    # The smallest of n uniform numbers is uniform again after this map: a large cluster is held
    # out no more often than a small one, and the order of its texts does not matter.
    at = 1.0 - (1.0 - min(map(hash_fraction, fingerprints))) ** len(fingerprints)
    for split, share in held_out.items():
        if at < share:
            return split
        at -= share
    return "train"
