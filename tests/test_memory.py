"""Memory that is handed out again, and never while something refers to it."""

from __future__ import annotations

import pytest
import torch

from forgetrain import memory


@pytest.fixture(autouse=True)
def own_memory(monkeypatch):
    monkeypatch.setattr(memory, "_free", None)


def test_it_comes_again_when_nothing_refers_to_it():
    memory.keep()
    part = memory.empty((3, 1 << 20)).fill_(1.0)[2, 5:]
    other = memory.empty((3, 1 << 20)).fill_(2.0)
    place = other.data_ptr()
    assert torch.equal(part, torch.ones((1 << 20) - 5))
    del other
    third = memory.empty((1 << 20, 6), torch.bfloat16)  # as many bytes
    assert third.data_ptr() == place
    assert third.shape == (1 << 20, 6)
    fourth = memory.empty((3, 1 << 20)).fill_(4.0)
    assert fourth.data_ptr() not in (place, part.untyped_storage().data_ptr())
    assert torch.equal(part, torch.ones((1 << 20) - 5))


def test_nothing_is_kept_unless_somebody_asks_for_it():
    memory.empty((3, 1 << 20))
    assert memory._free is None
    memory.keep()
    memory.empty((3,))
    assert memory._free == {}


def test_what_nothing_refers_to_can_be_given_back():
    memory.keep()
    memory.make_room([(3, 1 << 20), (3, 1 << 20), (5,)])
    assert [len(free) for free in memory._free.values()] == [2]
    kept = memory.empty((3, 1 << 20)).fill_(1.0)
    memory.give_back()
    assert [len(free) for free in memory._free.values()] == [0]
    assert torch.equal(kept, torch.ones(3, 1 << 20))


def test_asking_again_loses_nothing():
    memory.keep()
    place = memory.empty((3, 1 << 20)).data_ptr()
    memory.keep()
    assert memory.empty((3, 1 << 20)).data_ptr() == place
