"""What `apply` says of a schedule: how many layers prune, that none does, that it was made elsewhere."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from host_models import make_host

from tokenprune_ext import Schedule, apply
from tokenprune_ext.environment import device_name


def test_how_many_layers_prune_is_logged(caplog, recwarn):
    with caplog.at_level(logging.INFO, logger="tokenprune_ext"):
        apply(make_host("vit"), "topk", layers=[0, 1, 2], keep=[8, 8, 5])
    assert "topk prunes at 2 of 4 blocks (0, 2), 5 of 16 patch tokens leave the last of them" in caplog.text
    assert not recwarn


@pytest.mark.parametrize("how", [{"keep": 1.0}, {"macs": 1.0, "layers": [1]}, {"layers": [0, 2], "keep": 16}])
def test_a_method_that_prunes_nothing_is_warned_about(how):
    if how.get("keep") == 16:
        how = {**how, "keep": [16, 16]}
    with pytest.warns(UserWarning, match="topk prunes nothing: every layer keeps all 16 patch tokens") as found:
        apply(make_host("vit"), "topk", **how)
    assert found[0].filename == __file__


def test_dense_prunes_nothing_by_name(recwarn):
    apply(make_host("vit"), "dense")
    assert not recwarn


def test_origin_travels_with_a_schedule(tmp_path):
    here = device_name(torch.device("cpu"))
    plain = Schedule.build(make_host("vit"), "topk", keep=0.5)
    made = dataclasses.replace(plain, origin={"device": here, "found": {"trials": 3}})
    assert made == plain  # how it was found does not change what it is
    made.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json").origin == made.origin
    content = json.loads((tmp_path / "s.json").read_text())
    del content["origin"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert Schedule.load(tmp_path / "s.json").origin == {}
    with pytest.raises(TypeError, match="origin must be a mapping, got 'here'"):
        dataclasses.replace(plain, origin="here")


def test_a_schedule_of_another_device_is_warned_about(recwarn):
    plain = Schedule.build(make_host("vit"), "topk", keep=0.5)
    apply(make_host("vit"), dataclasses.replace(plain, origin={"device": device_name(torch.device("cpu"))}))
    assert not recwarn
    with pytest.warns(UserWarning, match="the schedule was made on 'Orin', and the model is on "):
        apply(make_host("vit"), dataclasses.replace(plain, origin={"device": "Orin"}))
