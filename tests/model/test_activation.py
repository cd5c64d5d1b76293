"""Tests of squared ReLU against its definition in torch."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.activation import squared_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (7,), (3, 5, 16), (130, 1024)])
def test_squared_relu_and_its_gradient_equal_torch_in_every_bit(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    y, expected = squared_relu(x), F.relu(x).pow(2)
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(squared_relu(x), expected)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))


def test_squared_relu_accepts_tensors_that_are_not_contiguous() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(squared_relu(x.T), F.relu(x.T).pow(2))
    assert torch.autograd.gradcheck(lambda x: squared_relu(x.T), x)
    assert torch.equal(torch.autograd.grad(squared_relu(x).sum(), x)[0], 2 * F.relu(x))


def test_squared_relu_saves_only_its_argument() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        squared_relu(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
