"""A stream of messages, with descriptors, over one end of a Unix socket pair."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

from trainonce.errors import WireError
from trainonce.wire import messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.wire.messages import Message

_MAX_LINE_BYTES = 16 << 20
_MAX_FDS = 8
_READ_BYTES = 1 << 16


class Channel:
    """One end of the connection between launcher and worker.

    Sending is thread-safe. Receiving is for one thread at a time.

    Args:
        sock: A connected stream socket of the AF_UNIX family; owned by the channel.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._buffer = b""
        self._fds: deque[int] = deque()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Return the launcher's channel and the worker's end, to be inherited by descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Adopt an inherited descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send `message`, and duplicates of `fds` with it.

        Raises:
            WireError: The other side is gone.
        """
        data = messages.encode(message)
        try:
            with self._send_lock:
                if fds:
                    sent = socket.send_fds(self._sock, [data], list(fds))
                    data = data[sent:]
                self._sock.sendall(data)
        except OSError as error:
            raise WireError(f"the other side is gone: {error}") from error

    def try_send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send `message` if the other side is still there; tell whether it was."""
        try:
            self.send(message, fds)
        except WireError:
            return False
        return True

    def receive(self) -> Message | None:
        """Wait for the next message; None when the other side is gone."""
        while True:
            found = self._next_line()
            if found is not None:
                return messages.decode(found)
            if not self._fill():
                return None

    def receive_ready(self) -> tuple[list[Message], bool]:
        """Read what is there after a selector said so.

        Returns:
            The messages, and whether the other side is still connected.
        """
        alive = self._fill()
        found: list[Message] = []
        while (line := self._next_line()) is not None:
            found.append(messages.decode(line))
        return found, alive

    def take_fd(self) -> int:
        """Return the next descriptor that came along; the caller owns it.

        Raises:
            WireError: None came.
        """
        if not self._fds:
            raise WireError("a message promised a descriptor, and none came with it")
        return self._fds.popleft()

    def close(self) -> None:
        """Close the connection and descriptors nobody took."""
        with contextlib.suppress(OSError):
            self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def _next_line(self) -> bytes | None:
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise WireError(f"a message exceeds {_MAX_LINE_BYTES} bytes")
            return None
        self._buffer = rest
        return line

    def _fill(self) -> bool:
        size = array.array("i").itemsize
        try:
            data, ancillary, _flags, _addr = self._sock.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(_MAX_FDS * size)
            )
        except OSError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % size])
                self._fds.extend(received)
        self._buffer += data
        return bool(data)
