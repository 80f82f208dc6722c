"""Does an installed tokenprune work under this torch? Run by .ci/check_torch, and by hand.

usage: smoke.py          the libraries that can load do, their kernels are registered and agree with the references
"""

import importlib
import itertools

import torch

import tokenprune_ext
from tokenprune_ext.info import collect, has_kernel
from tokenprune_ext.ops import __all__ as operators


def check_libraries() -> None:
    cpu, cuda = tokenprune_ext.LIBRARIES
    assert cpu.loaded, cpu
    if torch.version.cuda is None:
        assert not cuda.loaded, cuda
        assert "built without CUDA" in str(cuda.problem), cuda
    elif cuda.path.exists():
        assert cuda.loaded, cuda
    for name in operators:
        assert has_kernel(name, "cpu"), name
        assert has_kernel(name, "cuda") == cuda.loaded, name
    print(f"torch {torch.__version__}: _C_cpu loaded, _C_cuda {cuda.problem or 'loaded'}")


def check_operators(device: str) -> None:
    attn = torch.randn(2, 3, 33, 33, device=device).softmax(-1)
    x, scores = torch.randn(2, 33, 16, device=device), torch.rand(2, 33, device=device)
    kept = torch.tensor([[2, 5, 6, 30], [1, 2, 3, 32]], device=device)
    dropped = torch.tensor([[7, 1, 9], [4, 5, 6]], device=device)
    match = torch.tensor([[5, 2, 5], [3, 3, 3]], device=device)
    rank = scores.argsort(1).argsort(1)
    q, k = torch.randn(2, 3, 33, 16, device=device), torch.randn(2, 3, 33, 16, device=device)
    calls = {
        "wpr": (attn, torch.ones(33, device=device), 5, 1e-6),
        "attn_colsum": (attn, "max", "patch", 1),
        "head_aggregate": (torch.rand(2, 3, 33, device=device), 0.01, 0.7, 1),
        "topk_gather": (x, scores, 10, 1, "mean"),
        "merge_tokens": (x, scores, kept, dropped, match, 1),
        "attn_colsum_qk": (q, k, 0.25, "max", "patch", 1),
        "wpr_qk": (q, k, 0.25, torch.ones(33, device=device), 5, 1e-6),
        "nearest_token": (x, rank, 1),
        "bipartite_match": (x, scores, 10, 1, "unimportant"),
    }
    assert set(calls) == set(operators), "an operator is missing here"
    for name, args in calls.items():
        reference = importlib.import_module(f"tokenprune_ext.ops.{name}").reference
        result, expected = getattr(torch.ops.tokenprune, name)(*args), reference(*args)
        pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)
        torch.library.opcheck(getattr(torch.ops.tokenprune, name).default, args)


check_libraries()
for device in itertools.chain(["cpu"], ["cuda"] if torch.cuda.is_available() else []):
    check_operators(device)
    print(f"torch {torch.__version__}: operators on {device} agree with their references")
print({key: value for key, value in collect().items() if key in ("build", "libraries")})
