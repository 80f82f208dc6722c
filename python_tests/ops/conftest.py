import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The devices that have compiled kernels; CUDA is skipped, and says so, where there is no GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: CUDA kernels not run")
    return str(request.param)
