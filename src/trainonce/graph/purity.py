"""What a run of a node did that its key does not show, seen while it runs.

Two checks: the state of each global generator before and after, and an audit hook that sees the
files which the thread opens for reading, the sockets it connects and the programs it starts.
Neither sees what a thread or process started by the node does, nor what compiled code reads
without asking Python (memory-mapped formats, say): docs/graph-format.md lists it.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.graph.digest import checksum
from trainonce.graph.packages import is_library_file

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

_SYSTEM = tuple(map(Path, ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64")))
_NETWORK = frozenset({"socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"})
_PROGRAM = frozenset({"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"})
# Compiled code that opens a file by itself, and says so.
_OPENED = {"sqlite3.connect": "read", "ctypes.dlopen": "loaded"}
_FOLDER = frozenset({"os.listdir", "os.scandir"})
# The import system reads code; any other file that goes through it (`pkgutil.get_data`) is data.
_IMPORTERS = ("<frozen importlib", "<frozen zipimport")
_CODE = tuple(importlib.machinery.all_suffixes())
# Library files that read sources to show them, and what is installed.
_READERS = (
    "/linecache.py", "/tokenize.py", "/inspect.py", "/zipimport.py",
    "/importlib/metadata/__init__.py",
)  # fmt: skip

_local = threading.local()
_lock = threading.Lock()
_running: set[Watch] = set()
_is_hooked = False


class Watch:
    """Watches one run of a node, as a context manager in the thread that runs it.

    Args:
        name: Of the node.
        declared: Files and folders that it may read.
    """

    def __init__(self, name: str, declared: list[str]) -> None:
        self.name = name
        self.reasons: list[str] = []
        self._declared = [Path(path).resolve() for path in declared]
        self._written: set[Path] = set()
        self._read: dict[Path, str] = {}
        self._beside: set[str] = set()
        self._before: dict[str, str] = {}

    def __enter__(self) -> Watch:
        _hook_once()
        _watch_seeds()
        with _lock:
            for other in _running:
                other._beside.add(self.name)
                self._beside.add(other.name)
            _running.add(self)
        self._before = generator_states()
        _local.watch = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.watch = None
        with _lock:
            _running.discard(self)
        after = generator_states()
        for name, state in self._before.items():
            if after.get(name, state) != state:
                beside = f", or {sorted(self._beside)} beside it did" if self._beside else ""
                self.reasons.append(
                    f"it advanced the global generator of {name}{beside}; draw from a generator "
                    "of its own, or (torch) seed and draw within torch.random.fork_rng()"
                )
        for path, what in self._read.items():
            if path not in self._written and not self._is_known(path):
                self.reasons.append(f"it {what} {path}, which is no declared input")

    def take_over(self, node: str, reasons: list[str], sources: Iterable[str]) -> None:
        """Take over what a node that was computed within this one did: it is ours as well.

        Args:
            node: Its name.
            reasons: Why it is not cached.
            sources: Paths of files and folders that went into it.
        """
        self.reasons += [f"{node}, which it computes, is not kept: {reason}" for reason in reasons]
        for source in sources:
            self._read.setdefault(Path(source).absolute(), f"had {node} read")

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take one audit event of the watched thread."""
        if event == "open":
            self._opened(*arguments[:3])
        elif event in _FOLDER and isinstance(arguments[0], (str, bytes)):
            if not _is_import(""):
                self._read.setdefault(Path(os.fsdecode(arguments[0])).absolute(), "listed")
        elif event in _OPENED and isinstance(arguments[0], (str, bytes)):
            path = Path(os.fsdecode(arguments[0])).absolute()
            if path.exists():
                self._read.setdefault(path, _OPENED[event])
            else:
                self._written.add(path)  # it is made by being opened
        elif event in _NETWORK:
            self.reasons.append(f"it used the network ({event} {arguments[-1]!r})")
        elif event in _PROGRAM:
            self.reasons.append(f"it started a program ({arguments[0]!r})")

    def _opened(self, path: Any, mode: Any, flags: int) -> None:
        if not isinstance(path, (str, bytes)) or _is_import(os.fsdecode(path)):
            return
        target = Path(os.fsdecode(path)).absolute()
        if flags & os.O_TRUNC or flags & os.O_EXCL:
            self._written.add(target)
        elif flags & (os.O_WRONLY | os.O_RDWR) != os.O_WRONLY:
            self._read.setdefault(target, "read")

    def _is_known(self, path: Path) -> bool:
        resolved = path.resolve()
        if "random" in resolved.name and resolved.parent == Path("/dev"):
            return False
        if any(resolved.is_relative_to(folder) for folder in _SYSTEM):
            return True
        if any(resolved.is_relative_to(item) for item in self._declared):
            return True
        return is_library_file(resolved) or resolved.suffix == ".pyc" or not path.exists()


def watch_here() -> Watch | None:
    """Return the watch of the node that this thread runs, or None."""
    return getattr(_local, "watch", None)


@contextlib.contextmanager
def unwatched() -> Generator[None]:
    """Leave what this thread does to other checks: a `compute` within a node has its own."""
    before = watch_here()
    _local.watch = None
    try:
        yield
    finally:
        _local.watch = before


def generator_states() -> dict[str, str]:
    """Return a checksum of the state of every global generator in this process."""
    states: dict[str, str] = {}
    if "random" in sys.modules:
        states["Python"] = checksum(repr(sys.modules["random"].getstate()).encode())
    if "numpy.random" in sys.modules:
        kind, keys, *rest = sys.modules["numpy.random"].get_state()
        states["NumPy"] = checksum(keys.tobytes() + repr((kind, rest)).encode())
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_rng_state"):
        states["torch"] = checksum(torch.get_rng_state().numpy().tobytes())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for number, state in enumerate(torch.cuda.get_rng_state_all()):
                states[f"CUDA device {number}"] = checksum(state.numpy().tobytes())
    return states


def _is_import(path: str) -> bool:
    """Tell whether Python itself opens the file: to import it, or to show its source.

    Args:
        path: Of the file; empty for a folder that is listed.
    """
    frame = sys._getframe(3)
    for _ in range(3):
        name = frame.f_code.co_filename
        if name.startswith(_IMPORTERS):
            return not path or path.endswith(_CODE)
        if (name.endswith(_READERS) or "/torch/_" in name) and is_library_file(name):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


def _hook_once() -> None:
    global _is_hooked
    with _lock:
        if not _is_hooked:
            sys.addaudithook(_audit)
            _is_hooked = True


def _watch_seeds() -> None:
    """See it when NumPy seeds a generator from entropy, in whatever library that happens."""
    numpy = sys.modules.get("numpy.random.bit_generator")
    draw: Any = getattr(numpy, "randbits", None)
    if draw is None or hasattr(draw, "watched"):
        return

    def randbits(count: int) -> int:
        watch = watch_here()
        if watch is not None:
            watch.reasons.append("it made a NumPy generator without a seed")
        return draw(count)

    vars(randbits)["watched"] = True
    vars(numpy)["randbits"] = randbits


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    watch: Watch | None = getattr(_local, "watch", None)
    if watch is None:
        return
    _local.watch = None  # what the watch itself does is not watched
    try:
        watch.see(event, arguments)
    finally:
        _local.watch = watch
