"""`features`: a frozen module over a dataset, evaluated once."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import torch
from torch.utils.data import default_collate

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.graph.digest import checksum, digest
from trainonce.graph.features.compute import Collate, Engine, choose
from trainonce.graph.features.dataset import FeatureRows
from trainonce.graph.features.fingerprint import Fingerprint, fingerprint, write_aside
from trainonce.graph.features.selection import Call, Inputs, Selection
from trainonce.graph.features.sources import open_source
from trainonce.graph.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainonce.events import Event


def features(
    module: Callable[..., Any],
    dataset: Any,
    *,
    inputs: Inputs = None,
    outputs: Any = None,
    batch_size: int = 256,
    store: Store | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    storage_dtype: torch.dtype | None = None,
    audit: float = 0.0,
    verify: str = "first",
    variants: int = 0,
    ragged: Mapping[str, str] | None = None,
    collate: Collate | None = None,
    sample_key: Callable[[int], object] | None = None,
    version: str | None = None,
    exact: bool = False,
    budget_bytes: int | None = None,
    sink: Callable[[Event], None] | None = None,
) -> FeatureRows:
    """Evaluate a frozen module over a dataset, each sample once, ever.

    Rows are stored under (subgraph digest, sample digest). A later run, another head or
    another process finds them; a dataset that grew costs its new samples only. Several
    processes that ask at once share the work.

    Args:
        module: In the mode in which it is to be evaluated, usually `.eval()`. It may have
            parameters that require gradients: they are part of its digest, and no gradient
            flows through rows.
        dataset: Tensors, arrays, a tuple or dict of them, a map-style dataset, an image folder,
            a Hugging Face dataset, or rows of another module.
        inputs: What of a sample enters the module: nothing for the first item of a tuple; a
            key; several keys; a mapping from argument names to keys; a function of the sample.
            All else passes through.
        outputs: What to store of what the module returns: nothing for all of it; a key; several
            keys; a function. Dicts and tuples of tensors become dicts by name or place.
        batch_size: Samples in each call, at least 2; the last call is filled up, so that every
            row is computed in a batch of this size.
        store: Folder of the store, or the store; `$TRAINONCE_STORE`, or `$TRAINONCE_HOME/store`.
        device: Where to compute; where the module is. The module itself is not moved.
        storage_dtype: What floating-point outputs are stored as; part of the key.
        audit: Fraction of the stored rows to compute again and compare.
        verify: "first" checks each row at its first read in a process, "always" at each read.
        variants: For datasets with random augmentation: so many seeded variants of each sample
            are stored, and `set_epoch` turns from one to the next. 0 refuses randomness.
        ragged: For outputs whose rows differ in length: output name to the name of the output
            that holds the lengths.
        collate: Makes a batch of one argument's values; `default_collate`. Part of the key.
        sample_key: Names sample `i`, for datasets without a method `sample_key(i)`.
        version: Declares what the module computes, where its graph cannot be had.
        exact: Share rows only where they are equal bit by bit: same device model, thread
            count, torch build and batch size.
        budget_bytes: What all rows in the store may take on disk. Rows of other modules are
            evicted for it, those that save the fewest seconds per byte first.
        sink: Takes a `ComputeSaved` event where stored rows were used; the ledger if None.

    Returns:
        A map-style dataset of `(features, rest...)`, or a dict with the features in it.

    Raises:
        DataError: The module is not deterministic or changes its buffers, samples are random,
            or a dataset has no names for its samples.
        StoreError: The rows alone need more than `budget_bytes`.
        StateMismatchError: A sample's output depends on its batch, or an audit failed.
        ConfigError: An argument cannot be used.
    """
    _check_arguments(batch_size, audit, verify, variants)
    started = time.perf_counter()
    cut = _on_device(choose(module, outputs), device)
    selection = Selection(inputs)
    folder = store_folder(store)
    source = open_source(dataset, selection, folder, sample_key=sample_key)
    if source.num_samples == 0:
        raise ConfigError("the dataset is empty: there is nothing to compute")
    engine = Engine(
        module=cut,
        call_of=lambda index: source.call(index, 0 if variants else None),
        batch_size=batch_size,
        device=_device(cut, device),
        ragged=ragged or {},
        collate=collate or default_collate,
        storage_dtype=storage_dtype,
    )
    # Samples are named before one is computed: reading them may find that they are random.
    digests = [source.digests(v if variants else None) for v in range(max(1, variants))]

    def fingerprint_now() -> Fingerprint:
        first = bytes(digests[0][0])
        return _fingerprint(cut, engine, folder, first, version, exact, ragged, collate)

    return FeatureRows(
        source=source,
        engine=engine,
        fingerprint_now=fingerprint_now,
        folder=folder,
        digests=digests,
        audit=audit,
        verify=verify,
        started=started,
        sink=sink,
        has_variants=bool(variants),
        budget_bytes=budget_bytes,
        name=type(module).__qualname__ if isinstance(module, torch.nn.Module) else str(module),
    )


def store_folder(store: Store | str | os.PathLike[str] | None) -> Path:
    """Return the folder of the row store within `store`, or within the default one.

    Raises:
        ConfigError: The store is a URL: rows are memory-mapped, so they need a folder. Or it is
            opened for reading only.
    """
    if isinstance(store, Store):
        if store.read_only:
            raise ConfigError(
                f"the store {store.root} is open for reading only, and rows that miss are written",
                hint="give features(..., store=FOLDER): one that cannot be written is only read",
            )
        # Of a network file system the folder itself, since rows need no lock; a tenant has its own.
        shared = unquote(store.place.shared.removeprefix("file://"))
        below = store.root.relative_to(store.place.local)
        store = os.path.join(shared, below) if shared else store.root
    where = os.fspath(store) if store is not None else settings.STORE.get()
    if where is None:
        return settings.home() / "store" / "rows"
    if "://" in where:
        raise ConfigError(
            f"rows are memory-mapped and cannot lie at {where}",
            hint="give features(..., store=FOLDER), on a disk of this host or a shared one",
        )
    return Path(where).expanduser() / "rows"


def _check_arguments(batch_size: int, audit: float, verify: str, variants: int) -> None:
    if batch_size < 2:
        raise ConfigError(f"batch_size={batch_size}: at least 2 rows make a batch")
    if not 0.0 <= audit <= 1.0:
        raise ConfigError(f"audit={audit} is no fraction between 0 and 1")
    if verify not in ("first", "always"):
        raise ConfigError(f'verify={verify!r} is neither "first" nor "always"')
    if variants < 0:
        raise ConfigError(f"variants={variants} is negative")


def _fingerprint(
    cut: torch.nn.Module,
    engine: Engine,
    folder: Path,
    first: bytes,
    version: str | None,
    exact: bool,
    ragged: Mapping[str, str] | None,
    collate: Collate | None,
) -> Fingerprint:
    example = _example(engine, folder, first, collate)
    named = fingerprint(
        cut,
        example.args,
        example.kwargs,
        storage_dtype=engine.storage_dtype,
        version=version,
        exact=exact,
        free_dims=collate is not None,
        memo=folder / "graphs",
    )
    extra: list[tuple[str, object]] = [("ragged", dict(ragged))] if ragged else []
    if collate is not None:
        extra.append(("collate", collate))
    return named.extended(extra)


def _example(engine: Engine, folder: Path, first: bytes, collate: Collate | None) -> Call:
    """Return a batch of the shapes of real ones, read from the dataset once and then kept.

    Only dtypes and shapes matter to tracing; so a later run need not decode a sample.
    """
    name = digest((first, engine.batch_size, collate))
    path = folder / "examples" / f"{name}.json"
    try:
        kept = json.loads(path.read_text())
        if checksum(json.dumps(kept["call"]).encode()) == kept["checksum"]:
            args, kwargs = kept["call"]
            return Call(
                tuple(_zeros(spec, engine.device) for spec in args),
                {key: _zeros(spec, engine.device) for key, spec in kwargs.items()},
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, or damaged: a sample is read
    call = engine.batch([0])
    if all(isinstance(value, torch.Tensor) for _, value in call.parts()):
        plain = [[_spec(v) for v in call.args], {k: _spec(v) for k, v in call.kwargs.items()}]
        kept = {"call": plain, "checksum": checksum(json.dumps(plain).encode())}
        write_aside(path, json.dumps(kept).encode())
    return call


def _spec(value: torch.Tensor) -> list[Any]:
    return [str(value.dtype).removeprefix("torch."), list(value.shape)]


def _zeros(spec: list[Any], device: torch.device) -> torch.Tensor:
    dtype = getattr(torch, str(spec[0]))
    return torch.zeros([int(size) for size in spec[1]], dtype=dtype, device=device)


def _device(cut: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    for tensor in (*cut.parameters(), *cut.buffers()):
        return tensor.device
    return torch.device("cpu")


def _on_device(cut: torch.nn.Module, device: torch.device | str | None) -> torch.nn.Module:
    """Return the module on `device`; a copy where it is elsewhere."""
    tensors = [*cut.parameters(), *cut.buffers()]
    if device is None or all(tensor.device == torch.device(device) for tensor in tensors):
        return cut
    return copy.deepcopy(cut).to(device)
