"""Desks that let go of their folders at the end of a test."""

import contextlib

import pytest

from chatyuan.ranking.desk import Desk
from chatyuan.ranking.store import AnnotationLog


@pytest.fixture
def desk_of():
    """Opens a desk on FOLDER/run."""
    with contextlib.ExitStack() as logs:

        def opened(folder, items, overlap_period=0, taxonomy=()):
            log = logs.enter_context(AnnotationLog(folder / "run"))
            return Desk(items, log, seed=0, overlap_period=overlap_period, taxonomy=taxonomy)

        yield opened
