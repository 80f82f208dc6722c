"""The columns of the paper's tables: the benchmark counts as models are counted, and reaches them."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer

from tokenprune_ext import vtp
from tokenprune_ext.prune import describe


@pytest.fixture(scope="module")
def columns(bench):
    return import_module("vtp_columns")


def test_every_row_is_reached_within_three_percent(columns):
    for row in columns.PUBLISHED:
        widths = columns.implied(row)
        total = 7 * columns.CHANNELS
        assert sum(widths) == round(total * (1 - row.rate))
        found = columns.counted(row.classes, *map(np.asarray, widths))
        assert found == pytest.approx((row.parameters, row.macs), rel=0.03)


def test_counted_as_a_model_is(columns, monkeypatch):
    for name, value in {"DEPTH": 2, "CHANNELS": 64, "TOKENS": 17}.items():
        monkeypatch.setattr(columns, name, value)
    arguments = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 7}
    for widths in ((64, 64, 64, 256), (50, 20, 30, 99)):
        smaller = vtp.narrow_to(VisionTransformer(**arguments), [widths] * 2)
        found = vtp.report(smaller).parameters / 1e6, describe(smaller).model_macs / 1e9
        assert columns.counted(7, *map(np.asarray, widths)) == pytest.approx(found, rel=1e-12)
