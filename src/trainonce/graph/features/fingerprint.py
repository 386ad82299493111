"""The digest of a subgraph: what names the rows that a frozen module computes.

It covers the graph (see `graphs`), the values of the parameters and buffers the graph reads,
the numerics in force, and the dtype in which rows are stored. A module that changes buffers
or draws random numbers is refused with the reason.

Tracing takes seconds, so its result is kept: in the process by the module's code and
settings, and in the store for other processes. Weights are hashed anew at each call, since
writes through `.data` leave no trace; `Versions` is the cheap trigger in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch.utils._pytree import tree_flatten, tree_leaves

from trainonce.errors import DataError, UnhashableError
from trainonce.graph.digest import checksum, combine, digest
from trainonce.graph.features.graphs import GraphFacts, settings_of, trace
from trainonce.graph.features.segments import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

FORMAT = "rows-1"
_PARALLEL_BYTES = 64 << 20
_facts: dict[str, GraphFacts] = {}


@dataclass(frozen=True)
class Fingerprint:
    """The name of a subgraph, and how it came about.

    Args:
        digest: 64 hex digits: the subgraph's part of every row's key.
        parts: What it was made of, by name, for explaining a hit or a miss.
        facts: What is known about the graph.
    """

    digest: str
    parts: tuple[tuple[str, str], ...]
    facts: GraphFacts

    def extended(self, extra: Iterable[tuple[str, object]]) -> Fingerprint:
        """Return the fingerprint with further values in it.

        Raises:
            UnhashableError: A value has no digest.
        """
        more = tuple((name, digest(value, path=name)) for name, value in extra)
        if not more:
            return self
        parts = (*self.parts, *more)
        return Fingerprint(combine("subgraph", parts), parts, self.facts)

    def explain(self, other: Mapping[str, str]) -> list[str]:
        """Return which parts differ from those of another fingerprint."""
        mine = dict(self.parts)
        return [
            f"{name}: {other.get(name, 'none')} -> {mine.get(name, 'none')}"
            for name in sorted({*mine, *other})
            if mine.get(name) != other.get(name)
        ]


def fingerprint(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    storage_dtype: torch.dtype | None = None,
    version: str | None = None,
    exact: bool = False,
    free_dims: bool = False,
    memo: Path | None = None,
) -> Fingerprint:
    """Return the digest of `module` as it would compute these arguments now.

    Args:
        module: In the mode (train or eval) in which it will be called.
        args: A batch of examples on the device on which it will be called; dimension 0 of each
            tensor is the batch, at least 2 rows. The size of the batch does not count where
            the graph is free of it.
        kwargs: The same, by name.
        storage_dtype: What floating-point outputs are stored as; None keeps their own.
        version: Declares what the module computes, where its graph cannot be had: change it
            whenever the code changes. Weights are still hashed.
        exact: Count the device model, the number of threads and the batch size too, so that
            rows are shared only where they are equal bit by bit.
        free_dims: Other dimensions than the batch differ from call to call too.
        memo: Folder in which the results of tracing are kept for other processes.

    Raises:
        DataError: The module changes its buffers or draws random numbers, or its graph cannot
            be had and no version is declared.
    """
    kwargs = kwargs or {}
    device = _device_of(module, args)
    facts = (
        _declared(module, args, version)
        if version
        else _traced(module, args, kwargs, free_dims, memo)
    )
    if facts.refusal:
        raise DataError(
            f"outputs of {type(module).__qualname__} cannot be stored: {facts.refusal}",
            hint="freeze it with .eval(), or store up to the last layer that is deterministic",
        )
    parts = (
        ("format", FORMAT),
        ("graph", f"{facts.how}:{facts.digest}"),
        ("weights", weights_digest(module, facts.state)),
        *numerics(device, exact=exact),
        ("storage", str(storage_dtype)),
        *((("batch", str(_batch_size(args, kwargs))),) if exact else ()),
    )
    return Fingerprint(combine("subgraph", parts), parts, facts)


def numerics(device: torch.device, *, exact: bool) -> tuple[tuple[str, str], ...]:
    """Return the settings that change what the same graph yields on `device`."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) if kind in ("cpu", "cuda") else False
    with warnings.catch_warnings():
        # Old and new names of the same flags warn about each other.
        warnings.simplefilter("ignore")
        found = [
            ("torch", torch.__version__),
            ("device", kind),
            ("default_dtype", str(torch.get_default_dtype())),
            ("autocast", str(torch.get_autocast_dtype(kind)) if autocast else "off"),
            ("matmul_precision", torch.get_float32_matmul_precision()),
            ("deterministic", str(torch.are_deterministic_algorithms_enabled())),
        ]
        if kind == "cuda":
            cudnn = torch.backends.cudnn
            found += [
                ("tf32", f"{torch.backends.cuda.matmul.allow_tf32},{cudnn.allow_tf32}"),
                ("cudnn", f"{cudnn.enabled},{cudnn.deterministic},{cudnn.benchmark}"),
            ]
    if exact:
        model = torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine()
        found += [
            ("device_model", f"{model},{torch.backends.cpu.get_cpu_capability()}"),
            ("torch_build", str(torch.version.git_version)),
            ("threads", str(torch.get_num_threads())),
        ]
    return tuple(found)


def weights_digest(module: torch.nn.Module, names: Iterable[str]) -> str:
    """Return the digest of the named parameters and buffers: dtypes, shapes and values.

    Raises:
        DataError: One of them has no plain storage (sharded, quantised, meta).
    """
    hasher = blake3()
    for name in names:
        tensor = _named(module, name)
        # Subclasses (DTensor, quantised weights) hold more, or less, than their elements.
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(
            tensor, torch.nn.Buffer
        )
        if not plain or tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise DataError(
                f"parameter {name} is a {type(tensor).__qualname__} on {tensor.device}: "
                "it has no digest",
                hint="gather it into a plain tensor first",
            )
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        data = as_bytes(tensor.cpu()).data
        if data.nbytes >= _PARALLEL_BYTES:
            parallel = blake3(max_threads=blake3.AUTO)
            parallel.update(data)
            hasher.update(parallel.digest())
        else:
            hasher.update(blake3(data).digest())
    return hasher.hexdigest()


class Versions:
    """A cheap look at whether tensors changed: identity, storage and version counter.

    It sees optimizer steps, `load_state_dict` and every other in-place operator, but not
    writes through `.data` or NumPy views; so it says when to hash again soon, and hashing from
    time to time stays necessary.

    Args:
        tensors: Returns the tensors as they are now: a parameter may be another object later.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._tensors = tensors
        self._look()

    def changed(self) -> bool:
        """Tell whether any tensor changed since the last call, or since the start."""
        before = self._seen
        self._look()
        return self._seen != before

    def _look(self) -> None:
        held = list(self._tensors())
        self._seen = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in held]
        self._held = held  # so that nothing else can come to lie where one of them was


def _named(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _device_of(module: torch.nn.Module, args: tuple[Any, ...]) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in tree_leaves((args, dict(kwargs))):
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[0])
    return 0


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Describe example arguments: dtypes, shapes, devices."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    described = [
        (str(leaf.dtype), tuple(leaf.shape), leaf.device.type)
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for leaf in leaves
    ]
    return digest((described, str(spec)))


# ---------------------------------------------------------------- the graph, and keeping it


def _declared(module: torch.nn.Module, args: tuple[Any, ...], version: str) -> GraphFacts:
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    specs = [
        (str(value.dtype), tuple(value.shape[1:]))
        for value in args
        if isinstance(value, torch.Tensor)
    ]
    named = digest(("declared", version, type(module).__qualname__, module.training, specs))
    return GraphFacts(named, "declared", tuple(names), "", "its graph is declared, not known")


def _traced(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    free_dims: bool,
    memo: Path | None,
) -> GraphFacts:
    token = _token(module, args, kwargs, free_dims)
    if token is not None:
        facts = _facts.get(token) or _recall(memo, token)
        if facts is not None:
            _facts[token] = facts
            return facts
    facts, reason = trace(module, args, kwargs, free_dims=free_dims)
    if facts is None:
        raise DataError(
            f"the graph of {type(module).__qualname__} cannot be had ({reason})",
            hint='declare what it computes: features(..., version="1"), and change that '
            "whenever its code changes",
        )
    if token is not None:
        _facts[token] = facts
        _remember(memo, token, facts)
    return facts


def _token(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free_dims: bool
) -> str | None:
    """Return a digest of all that tracing could see but weights, or None where there is none."""
    try:
        settings = digest(settings_of(module))
    except UnhashableError:
        return None
    return combine(
        "trace",
        [
            ("format", FORMAT),
            ("settings", settings),
            ("inputs", f"{_inputs(args, kwargs)},{free_dims}"),
            *numerics(_device_of(module, args), exact=False),
        ],
    )


def _recall(memo: Path | None, token: str) -> GraphFacts | None:
    if memo is None:
        return None
    try:
        envelope = json.loads((memo / f"{token}.json").read_text())
        body = str(envelope["facts"])
        if checksum(f"{token}{body}".encode()) != envelope["checksum"]:
            return None
        fields: dict[str, Any] = json.loads(body)
        fields["state"] = tuple(fields["state"])
        return GraphFacts(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(memo: Path | None, token: str, facts: GraphFacts) -> None:
    if memo is None:
        return
    body = json.dumps(asdict(facts))
    envelope = json.dumps({"facts": body, "checksum": checksum(f"{token}{body}".encode())})
    write_aside(memo / f"{token}.json", envelope.encode())


def write_aside(path: Path, data: bytes) -> bool:
    """Write a small file whole or not at all; return False where the store takes no writes."""
    aside = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        return False
    return True
