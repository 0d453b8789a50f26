"""A short soak of every harm once; `make soak` goes on for longer, and at random."""

import pytest

from soak import HARMS, Soak, left_behind, report, shared_memory
from test_end_to_end import ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_every_harm_once_under_load(engine, tmp_path, monkeypatch):
    # Broken in production: a crash of one process, at the wrong moment, costs another its memory, its bytes or its life.
    monkeypatch.setenv("PD_LOG", "error")
    before, seed = shared_memory(), 7
    soak = Soak(engine, seed, tmp_path)
    soak.run(seconds=0, harms_min=len(HARMS))
    report(engine, 0, seed, soak)
    assert soak.wrong == []
    assert set(soak.harms) == set(HARMS)
    assert left_behind(before) == []
