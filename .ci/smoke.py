"""Does an installed tokenprune work under this torch? Run by .ci/check_torch, and by hand.

usage: smoke.py          the libraries that can load do, their kernels are registered and agree with the references
"""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import torch

import tokenprune_ext
from tokenprune_ext.info import collect, has_kernel
from tokenprune_ext.ops import __all__ as operators

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from operator_calls import operator_calls


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
    calls = operator_calls(device)
    assert set(calls) == set(operators), "an operator is missing here"
    for name, args in calls.items():
        reference = importlib.import_module(f"tokenprune_ext.ops.{name}").reference
        result, expected = getattr(torch.ops.tokenprune, name)(*args), reference(*args)
        pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)
        torch.library.opcheck(getattr(torch.ops.tokenprune, name).default, args)


def check_without_the_package() -> None:
    """As a C++ program does: the schemas, then the kernels."""
    load = "import sys, torch; [torch.ops.load_library(path) for path in sys.argv[1:]]; "
    call = "print(torch.ops.tokenprune.attn_colsum(torch.ones(1, 2, 3, 3), 'sum'))"
    subprocess.run([sys.executable, "-c", load + call, *map(str, tokenprune_ext.library_paths()[:2])], check=True)


check_libraries()
check_without_the_package()
for device in itertools.chain(["cpu"], ["cuda"] if torch.cuda.is_available() else []):
    check_operators(device)
    print(f"torch {torch.__version__}: operators on {device} agree with their references")
print({key: value for key, value in collect().items() if key in ("build", "libraries")})
