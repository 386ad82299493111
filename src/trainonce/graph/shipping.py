"""Node functions of a script, on their way to processes that cannot import the script.

Pools of the standard library run the script again in their children, so that functions are found
there by name. Dask, loky and Ray do not: what a script defines travels to them by value.
"""

from __future__ import annotations

import importlib
import io
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.graph.node import NodeFunction

if TYPE_CHECKING:
    from concurrent.futures import Executor


class ByValue:
    """A node function as bytes, for processes that run code of ours anyway."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def load(self) -> NodeFunction[..., Any]:
        """Return the function."""
        return importlib.import_module("cloudpickle").loads(self._data)


def shipped(
    function: NodeFunction[..., Any], executor: Executor
) -> NodeFunction[..., Any] | ByValue:
    """Return a function in a form in which the executor's processes can have it.

    Raises:
        ConfigError: It is part of the script, and cloudpickle is not installed.
    """
    by_name = isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor))
    if by_name or function.module != "__main__":
        return function
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError as error:
        raise ConfigError(
            f"processes of {type(executor).__name__} cannot import {function.name}",
            hint="define it in a module of its own, or pip install cloudpickle",
        ) from error

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, NodeFunction) and obj.module == "__main__":
                return NodeFunction, (obj.function, obj.options)
            return super().reducer_override(obj)

    stream = io.BytesIO()
    Pickler(stream).dump(function)
    return ByValue(stream.getvalue())
