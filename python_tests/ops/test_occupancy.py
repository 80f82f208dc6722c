"""What a GPU says of the launches of every operator, against the calculation on paper."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tokenprune_ext.launches import record_launches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: occupancy not asked for")
@pytest.mark.parametrize("execute", [True, False])
def test_occupancy_on_cuda(bench: Path, execute: bool) -> None:
    paper, calls = importlib.import_module("occupancy"), importlib.import_module("operator_calls")
    architecture = paper.ARCHITECTURES.get("sm_{}{}".format(*torch.cuda.get_device_capability()))
    for dtype in calls.DTYPES:
        for op, args in calls.operator_calls("cuda", dtype).items():
            with record_launches(execute=execute) as found:
                getattr(torch.ops.tokenprune, op)(*args)
            assert found, op
            for seen in found:
                assert seen.num_sms == torch.cuda.get_device_properties(0).multi_processor_count
                assert seen.waves > 0
                if architecture:
                    shared = seen.static_shared + seen.dynamic_shared
                    held = paper.blocks_per_sm(architecture, seen.threads, seen.registers, shared)
                    assert seen.blocks_per_sm == held, seen
    torch.cuda.synchronize()
