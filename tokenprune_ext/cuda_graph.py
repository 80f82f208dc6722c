"""A call as a CUDA graph: what is left of its latency when nothing has to be launched from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the call and returns its results, always the same tensors.

    Raises:
        RuntimeError: the call cannot be captured, e.g. because it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # what is set up by the first call must not be part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay
