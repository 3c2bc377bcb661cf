import pytest
import torch

from devices import DEVICES
from runs import forget_accelerate


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def comparable_arithmetic():
    """float32 in full, and sums in one order, so that devices and runs can be compared."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = False, True, False
    forget_accelerate()
    yield
    forget_accelerate()
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before
