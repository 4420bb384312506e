import pytest
import torch

from forgetrain.errors import UserError
from forgetrain.numerics import device
from forgetrain.numerics.device import check_device, this_gpu
from forgetrain.spec.target import Hardware


class Properties:
    total_memory = 79 * 2**30


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one H100, as torch describes it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: "3.6.0")
    return monkeypatch


def refused(**hardware):
    with pytest.raises(UserError) as error:
        check_device(Hardware(**hardware))
    return str(error.value)


def test_a_cpu_is_always_there():
    check_device(Hardware(name="cpu"))


def test_the_targets_own_gpu_is_taken(gpu):
    check_device(Hardware(name="h100"))
    assert this_gpu() == "h100"


def test_another_gpu_is_named_with_the_override_that_takes_it(gpu):
    said = refused(name="h200")
    assert "NVIDIA H100 80GB HBM3" in said
    assert "--set hardware.name=h100" in said


def test_more_memory_than_there_is(gpu):
    assert "79 GiB" in refused(name="h100", memory_gib=140)


def test_a_driver_that_is_too_old(gpu):
    def start():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    gpu.setattr(torch.cuda, "init", start)
    said = refused(name="h100")
    assert "too old (found version 11040)" in said
    assert "Please update" not in said


def test_a_triton_that_is_too_old(gpu):
    gpu.setattr(device.importlib.metadata, "version", lambda name: "3.5.1")
    assert "there is 3.5.1" in refused(name="h100")


def test_a_cudnn_that_is_too_old(gpu):
    gpu.setattr(torch.backends.cudnn, "version", lambda: 8900)
    assert "torch has 8900" in refused(name="h100")


def test_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in refused(name="h200")
