import pytest
import torch

from forgetrain.ops.accumulate import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_summed_in_fp32(name):
    first, second = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([2.0**-9, 1.0]).bfloat16()
    total = VARIANTS[name].forward(None, first)
    total = VARIANTS[name].forward(total, second)
    assert total.dtype == torch.float32
    assert total.tolist() == [1.0 + 2.0**-9, 3.0]


def test_the_two_starts_differ_in_the_sign_of_zero_alone():
    negative_zero = torch.tensor([-0.0])
    assert torch.signbit(VARIANTS["textbook"].forward(None, negative_zero)).item()
    assert not torch.signbit(VARIANTS["zeros"].forward(None, negative_zero)).item()
