"""The section of the soak about guards, at its smallest."""

from __future__ import annotations

from soak.guards import FAULTS, run


def test_every_fault_is_survived(tmp_path):
    rows = run(tmp_path, seed=0, scale=0.25)
    assert [r.fault for r in rows] == list(FAULTS)
    assert all(r.passed for r in rows), rows
    assert sum(r.injected for r in rows) > 20
