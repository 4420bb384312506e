"""Messages between the parent and an engine's process: a JSON header, then the raw bytes of its tensors.

    frame  = magic (4 bytes), length of the header (uint32, little-endian), header, tensors back to back
    header = {"kind": str, "fields": {...}, "tensors": [[name, dtype, [size, ...]], ...]}

Nothing that arrives is unpickled or evaluated. A receiver sees the header, and may refuse it, before a byte of tensor
memory is allocated. This file needs torch and the standard library only: it is copied into sandboxes.
"""

from __future__ import annotations

import ctypes
import json
import math
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAGIC = b"FGT1"
HEADER_LIMIT = 64 << 20  # bytes: the names and shapes of a state of some hundred thousand tensors
_STAGE = 64 << 20  # bytes of host memory through which tensors come to a GPU and leave it
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class ProtocolError(Exception):
    """What arrived is not a message of this protocol, or not one that the receiver admits."""


class Closed(Exception):
    """The other end is gone."""


class Spec(NamedTuple):
    """A tensor that is about to follow a header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Message(NamedTuple):
    kind: str
    fields: dict[str, Any]
    tensors: list[tuple[str, Tensor]]


#: Raises ProtocolError for a header that the receiver does not want: (kind, fields, specs).
Admit = Callable[[str, dict[str, Any], list[Spec]], None]


class Channel:
    """One end of a stream socket. Deadlines are ``time.monotonic()`` seconds; None waits for ever.

    ``empty``: memory of a shape and dtype, for what arrives. ``device``: the GPU on which it arrives, if any.
    """

    def __init__(self, sock: socket.socket, empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None):
        sock.setblocking(False)
        self.socket = sock
        self.device: str | None = None
        self._empty = empty or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=self.device))
        self._stage: Tensor | None = None

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        tensors: Iterable[tuple[str, Tensor]] = (),
        deadline: float | None = None,
    ) -> None:
        """Sends tensors from any device, piece by piece through host memory. Raises TimeoutError or Closed."""
        tensors = list(tensors)
        specs = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]
        header = json.dumps({"kind": kind, "fields": dict(fields or {}), "tensors": specs}).encode()
        if len(header) > HEADER_LIMIT:
            raise ProtocolError(f"a header of {len(header)} bytes exceeds {HEADER_LIMIT}")
        self._write(MAGIC + len(header).to_bytes(4, "little") + header, deadline)
        for _, tensor in tensors:
            for host in self._on_host(tensor.detach().contiguous()):
                self._write(_bytes_of(host), deadline)

    def receive(self, deadline: float | None = None, admit: Admit | None = None) -> Message:
        """The next message. Raises TimeoutError, Closed, or ProtocolError (also what ``admit`` raises)."""
        start = bytearray(8)
        self._read(memoryview(start), deadline)
        if start[:4] != MAGIC:
            raise ProtocolError(f"expected a message, got the bytes {bytes(start)!r}")
        length = int.from_bytes(start[4:], "little")
        if length > HEADER_LIMIT:
            raise ProtocolError(f"a header of {length} bytes exceeds {HEADER_LIMIT}")
        text = bytearray(length)
        self._read(memoryview(text), deadline)
        kind, fields, specs = _parse(text)
        if admit is not None:
            admit(kind, fields, specs)
        return Message(kind, fields, [(spec.name, self._read_tensor(spec, deadline)) for spec in specs])

    def pending(self) -> bool:
        """Whether something has arrived that nobody asked for; the end of the stream is nothing."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:  # nothing yet, or the other end is gone
            return False

    def close(self) -> None:
        self.socket.close()

    def _on_host(self, tensor: Tensor) -> Iterator[Tensor]:
        """A contiguous tensor, whole, or from a GPU in pieces."""
        if not tensor.is_cuda:
            yield tensor.to("cpu")
            return
        for piece, host in self._staged(tensor):
            host.copy_(piece)
            yield host

    def _staged(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of a tensor's bytes, each with as much pinned host memory. That is always the same: fresh memory comes
        from the kernel page by page, slower than the copy, the socket and the GPU's bus together."""
        if self._stage is None:
            self._stage = torch.empty(_STAGE, dtype=torch.uint8, device="cpu", pin_memory=True)
        for piece in tensor.view(-1).view(torch.uint8).split(_STAGE):
            yield piece, self._stage[: len(piece)]

    def _read_tensor(self, spec: Spec, deadline: float | None) -> Tensor:
        # a bool whose byte is neither 0 nor 1 is undefined behaviour, so bools arrive as bytes and are checked
        raw = self._empty(spec.shape, torch.uint8 if spec.dtype == torch.bool else spec.dtype)
        if raw.is_cuda:
            for piece, host in self._staged(raw):
                self._read(_bytes_of(host), deadline)
                piece.copy_(host)
        else:
            self._read(_bytes_of(raw), deadline)
        if spec.dtype == torch.bool:
            if raw.numel() and int(raw.max()) > 1:
                raise ProtocolError(f"{spec.name} has bools that are neither 0 nor 1")
            return raw.view(torch.bool)
        return raw

    def _read(self, view: memoryview, deadline: float | None) -> None:
        while len(view):
            try:
                count = self.socket.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise Closed(str(error)) from None
            if count == 0:
                raise Closed("the stream ended")
            view = view[count:]

    def _write(self, data: bytes | memoryview, deadline: float | None) -> None:
        view = memoryview(data)
        while len(view):
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise Closed(str(error)) from None

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self.socket, event)
        remaining = None if deadline is None else (deadline - time.monotonic()) * 1000
        if remaining is not None and (remaining <= 0 or not poll.poll(remaining)):
            raise TimeoutError
        if remaining is None:
            poll.poll()


def _parse(text: bytearray) -> tuple[str, dict[str, Any], list[Spec]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is not JSON: {error}") from None
    if not (isinstance(header, dict) and set(header) == {"kind", "fields", "tensors"}):
        raise ProtocolError("the header has other keys than kind, fields and tensors")
    kind, fields, tensors = header["kind"], header["fields"], header["tensors"]
    if not (isinstance(kind, str) and isinstance(fields, dict) and isinstance(tensors, list)):
        raise ProtocolError("the header's kind, fields or tensors have the wrong type")
    return kind, fields, [_spec(item) for item in tensors]


def _spec(item: Any) -> Spec:
    if not (isinstance(item, list) and len(item) == 3):
        raise ProtocolError("a tensor is announced as [name, dtype, shape]")
    name, dtype, shape = item
    if not (isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES):
        raise ProtocolError(f"a tensor is announced with name {name!r:.100} and dtype {dtype!r:.100}")
    return Spec(name, DTYPES[dtype], shape_of(shape))


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape that came as JSON. Raises ProtocolError unless it is a short list of sizes that memory could hold."""
    if not (isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in value)):
        raise ProtocolError(f"not a shape: {value!r:.100}")
    if math.prod(value) >= 2**40:
        raise ProtocolError(f"too large: {value!r:.100}")
    return tuple(value)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, without a copy; the caller keeps the tensor alive."""
    count = tensor.numel() * tensor.element_size()
    if count == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr()))
