"""Every recipe for many steps: the numbers stay finite and the memory stays bounded. Only ``make soak`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from leibler import recipes
from soak.long_runs import endure


@pytest.mark.soak
@pytest.mark.parametrize("slug", recipes.names())
def test_a_recipe_runs_for_long(slug: str, tmp_path: Path):
    assert endure(slug, tmp_path) == ([], 0)
