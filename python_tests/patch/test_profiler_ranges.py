"""What a pruning layer does has a readable name in torch's profiler, and costs nothing where nobody looks."""

from __future__ import annotations

import torch
from host_models import images_for, make_host
from torch.profiler import ProfilerActivity, profile

from tokenprune_ext.prune import apply


def test_ranges_and_operators():
    model = apply(make_host("vit"), "zero_tprune", layers=[1, 2], keep=[11, 7])
    images = images_for(model)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        model(images)
    names = [event.name for event in found.events()]
    assert [name for name in names if name.startswith("tokenprune zero")] == [
        "tokenprune zero_tprune, block 1: 16 -> 11 patches",
        "tokenprune zero_tprune, block 2: 11 -> 7 patches",
    ]
    assert names.count("tokenprune::zero_tprune") == 2


def test_compiling_while_somebody_records():
    model = apply(make_host("vit", depth=2), "topk", layers=[0], keep=0.6)
    images = images_for(model)
    torch.compiler.reset()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]):
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
        torch.testing.assert_close(compiled, model(images))
