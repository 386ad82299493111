"""The TCPStore through which ranks find each other, hosted by the launcher.

It must not live in a rank: the job would die with it. The socket listens before torch is
imported, so that workers can start at once; early connections wait in its backlog.
"""

from __future__ import annotations

import socket
import threading
from typing import Any, Protocol

from trainonce.errors import ConfigError

_BACKLOG = 4096


class Store(Protocol):
    """A store that workers reach on loopback."""

    @property
    def port(self) -> int:
        """Where it listens."""
        ...

    def start(self) -> None:
        """Begin to serve, in the background."""
        ...

    def renew(self) -> None:
        """Serve an empty store instead: torch expects one for each restart of all ranks."""
        ...

    def close(self) -> None:
        """Stop serving."""
        ...


class TorchStore:
    """torch's own TCPStore, on a socket that listens from the start.

    Args:
        port: Port to listen on; 0 for a free one.

    Raises:
        ConfigError: The port is in use.
    """

    def __init__(self, port: int = 0) -> None:
        self._wanted_port = port
        self._sock = _listen(port)
        self._port: int = self._sock.getsockname()[1]
        self._thread: threading.Thread | None = None
        self._store: Any = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    def start(self) -> None:
        """Import torch and serve, in a thread: the control loop does not wait for it."""
        self._thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Serve an empty store instead, on another port unless one was asked for."""
        self.close()
        self._sock = _listen(self._wanted_port)
        self._port = self._sock.getsockname()[1]
        self.start()

    def close(self) -> None:
        """Stop serving. Waits for torch's import: an interpreter must not end inside one."""
        if self._thread is not None:
            self._thread.join()
        self._store = None
        self._sock.close()

    def _serve(self) -> None:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self._store = TCPStore(
            "127.0.0.1",
            self._port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._sock.detach(),
        )


def _listen(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port {port} on 127.0.0.1 cannot be used: {error.strerror}",
            hint="give another --master-port, or none for a free one",
        ) from error
    return sock
