"""Framing: every dtype survives, and what is no message is refused before memory is allocated for it."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
import torch

from forgetrain.engine.protocol import DTYPES, MAGIC, Channel, Closed, ProtocolError


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    yield Channel(one), Channel(other)
    one.close()
    other.close()


def soon() -> float:
    return time.monotonic() + 2.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives(ends, dtype):
    sent = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    ends[0].send(
        "hello", {"lr": 0.1, "nested": {"a": [1, None]}}, [("a/b", sent), ("empty", sent[:0]), ("one", sent[0, 1])]
    )
    message = ends[1].receive(soon())
    assert (message.kind, message.fields) == ("hello", {"lr": 0.1, "nested": {"a": [1, None]}})
    names, tensors = zip(*message.tensors, strict=True)
    assert names == ("a/b", "empty", "one")
    for got, want in zip(tensors, (sent, sent[:0], sent[0, 1]), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got, want)


def test_nan_payloads_and_strides_survive(ends):
    sent = torch.tensor([[0x7FC00001, -1], [0, 0x7F800000]], dtype=torch.int32).view(torch.float32).t()
    ends[0].send("x", {}, [("t", sent)])
    assert torch.equal(ends[1].receive(soon()).tensors[0][1].view(torch.int32), sent.contiguous().view(torch.int32))


def test_a_large_tensor_passes_while_both_ends_run(ends):
    sent = torch.arange(1 << 20)
    thread = threading.Thread(target=ends[0].send, args=("x", {}, [("t", sent)], soon()))
    thread.start()
    assert torch.equal(ends[1].receive(soon()).tensors[0][1], sent)
    thread.join()


def frame(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text


def announce(*spec: object) -> bytes:
    return frame({"kind": "x", "fields": {}, "tensors": [list(spec)]})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello world", "expected a message"),
        (MAGIC + b"\xff\xff\xff\xff", "header of"),
        (frame(b"\xff\xfe"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame(b"1" * 10_000), "not JSON"),
        (frame([]), "other keys"),
        (frame({"kind": "x", "fields": {}}), "other keys"),
        (frame({"kind": 1, "fields": {}, "tensors": []}), "wrong type"),
        (frame({"kind": "x", "fields": {}, "tensors": [1]}), "announced"),
        (announce("t", "object", [1]), "dtype"),
        (announce("t", "float8_e4m3fn", [1]), "dtype"),
        (announce(["t"], "float32", [1]), "name"),
        (announce("t", "float32", [-1]), "shape"),
        (announce("t", "float32", [True]), "shape"),
        (announce("t", "float32", [1.0]), "shape"),
        (announce("t", "float32", "ab"), "shape"),
        (announce("t", "float32", [1] * 9), "shape"),
        (announce("t", "float32", [1 << 30, 1 << 30]), "too large"),
        (announce("t", "bool", [1]) + b"\x02", "neither 0 nor 1"),
    ],
)
def test_garbage_is_refused(ends, data, words):
    ends[0].socket.sendall(data)
    with pytest.raises(ProtocolError, match=words):
        ends[1].receive(soon())


def test_a_receiver_can_refuse_a_header_before_its_tensors_are_read(ends):
    def refuse(kind, fields, specs):
        raise ProtocolError(f"{specs[0].nbytes} bytes are too many")

    ends[0].socket.sendall(announce("t", "float32", [1 << 37]))
    with pytest.raises(ProtocolError, match=str(1 << 39)):
        ends[1].receive(soon(), refuse)


def test_an_end_and_a_deadline(ends):
    with pytest.raises(TimeoutError):
        ends[1].receive(time.monotonic() + 0.05)
    ends[0].socket.sendall(MAGIC)  # trickling does not extend the deadline
    with pytest.raises(TimeoutError):
        ends[1].receive(time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        ends[0].send("x", {}, [("t", torch.zeros(1 << 22))], time.monotonic() + 0.05)
    ends[0].close()
    with pytest.raises((Closed, ProtocolError)):  # what had been sent comes first
        ends[1].receive(soon())
