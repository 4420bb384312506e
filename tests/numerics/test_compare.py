import torch

from forgetrain.numerics.compare import difference, ordered


def test_equal_tensors_have_no_difference():
    x = torch.randn(4, 5)
    assert difference(x, x.clone()) is None
    assert difference(torch.tensor(float("nan")), torch.tensor(float("nan"))) is None


def test_one_ulp_is_found_counted_and_placed():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=dtype)
        y = x.clone()
        y[1, 1] = torch.nextafter(y[1, 1], torch.tensor(-9.0, dtype=dtype))
        found = difference(x, y)
        assert found is not None
        assert (found.count, found.total, found.max_ulp, found.first_index) == (1, 4, 1, (1, 1))
        assert found.expected == -4.0


def test_the_sign_of_zero_counts_as_a_difference_of_no_ulp():
    found = difference(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert found is not None
    assert found.max_ulp == 0


def test_shape_and_dtype_are_named():
    found = difference(torch.zeros(2, 3), torch.zeros(3, 2))
    assert found is not None
    assert (found.max_ulp, found.expected, found.actual) == (None, "float32 [2, 3]", "float32 [3, 2]")
    assert "bfloat16" in str(difference(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)))


def test_order_of_floats_is_kept():
    x = torch.tensor([-float("inf"), -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, float("inf")])
    steps = ordered(x).diff()
    assert bool((steps >= 0).all())
    assert steps[3] == 0
