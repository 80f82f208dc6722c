"""A pruned model goes wherever the dense one goes: every path with every method, and with every family of models."""

from __future__ import annotations

import pytest
from deploy_paths import CASES, PATHS, pruned


@pytest.mark.parametrize(("host", "method"), CASES)
@pytest.mark.parametrize("path", PATHS)
def test_path(path, host, method, tmp_path):
    PATHS[path](pruned(host, method), tmp_path)
