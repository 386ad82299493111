"""Nodes: calls that have not happened yet, and the inputs that are files.

Calling a function decorated with `once.node` builds a `Node`. Nothing runs until
`once.compute`; what runs then is decided by keys (`keys`) and done by `executor`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, cast, overload

from trainonce.errors import ConfigError, GraphError, LazyNodeError
from trainonce.graph.digest import Encoder, handles, unhashable
from trainonce.graph.numerics import MODES
from trainonce.graph.packages import module_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a node is keyed and run; see `node`."""

    version: str | None = None
    ignore: tuple[str, ...] = ()
    refresh: bool = False
    cache: bool = True
    numerics: str = "tolerant"
    gpus: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.numerics not in MODES:
            raise ConfigError(f"numerics={self.numerics!r} is none of {MODES}")
        if self.gpus < 0 or self.threads < 1:
            raise ConfigError(f"a node needs gpus >= 0 and threads >= 1, not {self}")


class NodeFunction(Generic[P, R]):
    """A function whose calls are nodes. Made by `node`.

    `function` is the plain one, for calling it at once.
    """

    def __init__(self, function: Callable[P, R], options: Options) -> None:
        self.function = function
        self.options = options
        self.module = module_name(function.__module__)
        self.name = f"{self.module}.{function.__qualname__}"
        # Whether nothing may run beside it in its process, whatever its code names.
        self.alone = False
        # Whose code the key covers; more where the function calls what users hand over.
        self.code: tuple[Callable[..., Any], ...] = (function,)
        self.signature = inspect.signature(function)
        unknown = set(options.ignore) - set(self.signature.parameters)
        if unknown:
            raise ConfigError(f"{self.name} has no parameters {sorted(unknown)} to ignore")
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Node[R]:
        """Return the call as a lazy node."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Node(self, bound)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an instance, which then is the first input of the node."""
        call = cast("Any", self)
        return self if instance is None else functools.partial(call, instance)

    def __reduce__(self) -> tuple[object, ...]:
        return (find_node_function, (self.module, self.function.__qualname__))

    def __repr__(self) -> str:
        return f"<node function {self.name}>"


class Node(Generic[R]):
    """A call that has not happened yet.

    Args:
        function: What is called.
        bound: Its arguments, defaults included; nodes among them are inputs.
    """

    def __init__(self, function: NodeFunction[..., R], bound: inspect.BoundArguments) -> None:
        self.function = function
        self.bound = bound

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.name

    def compute(self, **options: Any) -> R:
        """Evaluate this node; `options` are those of `once.compute`."""
        from trainonce.graph.executor import compute

        return cast("R", compute(self, **options))

    def __repr__(self) -> str:
        return f"<lazy node {self.name}>"

    def _refuse(self, use: str) -> NoReturn:
        raise LazyNodeError(
            f"{self!r} has no value yet, so it cannot be used for {use}",
            hint="call `once.compute(node)` first, or do it within a node",
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            # An AttributeError, or `hasattr`, copies and pickles would break.
            hint = "" if name.startswith("__") else "; call `once.compute(node)` for its value"
            raise AttributeError(f"a lazy node has no attribute {name!r}{hint}")

    def __bool__(self) -> bool:
        self._refuse("a condition")

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iterating")

    def __len__(self) -> int:
        self._refuse("len()")

    def __getitem__(self, index: object) -> Any:
        self._refuse("indexing")

    def __contains__(self, item: object) -> bool:
        self._refuse("`in`")

    def __array__(self, *_: object, **__: object) -> Any:
        self._refuse("an array")

    def __float__(self) -> float:
        self._refuse("a number")

    def __int__(self) -> int:
        self._refuse("a number")

    def __index__(self) -> int:
        self._refuse("an index")


class File(os.PathLike[str]):
    """A file as an input: it counts by its content, and reaches the function as a path.

    Args:
        path: Of the file.
        strict: Read it every time, even if size, inode and time stamps are unchanged.
    """

    def __init__(self, path: str | os.PathLike[str], *, strict: bool = False) -> None:
        self.path = Path(path)
        self.strict = strict

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class Dir(File):
    """A folder as an input: it counts by the names and contents of all files below it."""

    def files(self) -> list[tuple[str, Path]]:
        """Return the relative name and path of each entry below it, sorted.

        Folders are entries as well, so that an empty one counts; links are followed.

        Raises:
            OSError: It is no folder, or one below it cannot be read.
        """
        found: list[tuple[str, Path]] = []
        for folder, folders, files in os.walk(self.path, onerror=_raise, followlinks=True):
            base = Path(folder)
            if len(base.parts) - len(self.path.parts) > 100:
                raise GraphError(f"{self!r} has links that go round in circles")
            entries = [base / name for name in (*folders, *files)]
            found += [(entry.relative_to(self.path).as_posix(), entry) for entry in entries]
        return sorted(found)


@overload
def node(function: Callable[P, R], /) -> NodeFunction[P, R]: ...
@overload
def node(
    *,
    version: str | None = None,
    ignore: tuple[str, ...] | list[str] = (),
    refresh: bool = False,
    cache: bool = True,
    numerics: str = "tolerant",
    gpus: int = 0,
    threads: int = 1,
) -> Callable[[Callable[P, R]], NodeFunction[P, R]]: ...
def node(
    function: Callable[..., Any] | None = None,
    /,
    *,
    version: str | None = None,
    ignore: tuple[str, ...] | list[str] = (),
    refresh: bool = False,
    cache: bool = True,
    numerics: str = "tolerant",
    gpus: int = 0,
    threads: int = 1,
) -> Any:
    """Make the calls of a function lazy nodes, whose results are computed once.

    Args:
        function: The function. It must not change its inputs; its result is stored, so that
            arrays, tensors, frames, dataclasses and plain values are what it should return.
        version: Stands for the code in the key: edits then count only when it is changed.
        ignore: Names of parameters that do not count.
        refresh: Evaluate it in every `compute`, and keep the new result.
        cache: Keep results at all.
        numerics: "tolerant" shares results across hosts; "exact" adds device model, torch build
            and thread count to the key.
        gpus: GPUs that one evaluation occupies.
        threads: CPU threads that one evaluation occupies; pinned with `numerics="exact"`.

    Raises:
        ConfigError: An option does not fit.
    """
    settings = Options(
        version=version,
        ignore=tuple(ignore),
        refresh=refresh,
        cache=cache,
        numerics=numerics,
        gpus=gpus,
        threads=threads,
    )
    if function is None:
        return lambda inner: NodeFunction(inner, settings)
    return NodeFunction(function, settings)


def _raise(error: OSError) -> None:
    raise error


def find_node_function(module: str, qualname: str) -> NodeFunction[..., Any]:
    """Return the node function of that name; whatever stands there may be another thing."""
    found: Any = importlib.import_module(module)
    for step in qualname.split("."):
        found = getattr(found, step)
    return found


# ---------------------------------------------------------------- digests of nodes and files


class Resolver:
    """Gives nodes and files their digests while a key is made; `executor` has the real one."""

    def output_of(self, node: Node[Any]) -> str | None:
        """Return the output digest of an evaluated node."""
        raise NotImplementedError

    def content_of(self, file: File) -> str:
        """Return the digest of a file's or folder's content."""
        raise NotImplementedError


current = threading.local()


def _resolver(path: str, value: object) -> Resolver:
    resolver = getattr(current, "resolver", None)
    if resolver is None:
        raise unhashable(path, value, "it has one only while a graph is computed")
    return resolver


@handles(Node)
def _encode_node(encoder: Encoder, value: Node[Any], path: str) -> None:
    output = _resolver(path, value).output_of(value)
    if output is None:
        raise unhashable(path, value, "it sits where it was not found as an input, or its own "
                         "result has no digest")  # fmt: skip
    encoder.record("output", output, path=path)


@handles(File)
@handles(Dir)
def _encode_file(encoder: Encoder, value: File, path: str) -> None:
    kind = type(value).__name__
    encoder.record(kind, _resolver(path, value).content_of(value), path=path)


@handles(NodeFunction)
def _encode_function(encoder: Encoder, value: NodeFunction[..., Any], path: str) -> None:
    # A declared version stands for its code here as it does in its own key.
    code = value.function if value.options.version is None else value.name
    encoder.record("node function", code, repr(value.options), path=path)
