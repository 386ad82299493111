"""Datasets whose samples are read one by one: by declared keys, by files, or each of them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import DataError, UnhashableError
from trainonce.graph.code_objects import full_name
from trainonce.graph.digest import digest, digest_file, is_settled
from trainonce.graph.features import labels
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.samples import (
    content_digest,
    derived,
    named_digests,
    no_randomness,
    seeded,
)
from trainonce.graph.features.segments import DIGEST_BYTES, Column, Rows
from trainonce.graph.features.selection import Call, Selection, as_tensors
from trainonce.graph.features.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.labels import Labels
    from trainonce.graph.features.source import Lineage

_log = logging.getLogger(__name__)
# Inputs that were decoded to be hashed are kept for being computed, up to this much.
_KEPT_BYTES = 512 << 20
# So many samples are read twice, to notice those that are not the same each time.
_READ_TWICE = 8


class ItemSource(Source):
    """A map-style dataset whose samples are read one by one, under guard."""

    def __init__(self, dataset: Any, selection: Selection) -> None:
        super().__init__(len(dataset), selection)
        self._dataset = dataset
        self._kept: dict[tuple[int, int | None], Call] = {}
        self._kept_bytes = 0
        self._seeds: NDArray[np.bytes_] | None = None

    def read(self, index: int, variant: int | None) -> tuple[Call, Any]:
        """Read and decode one sample.

        Raises:
            DataError: Reading it drew random numbers, and no variants were asked for.
        """
        name = f"sample {index} of {type(self._dataset).__qualname__}"
        if variant is None:
            with no_randomness(name):
                sample = self._dataset[index]
        else:
            seed = f"{index}" if self._seeds is None else self._seeds[index].hex()
            with seeded(f"variant:{variant}:{seed}".encode()):
                sample = self._dataset[index]
        call, rest = self.selection.split(sample)
        return as_tensors(call), rest

    def keep(self, index: int, variant: int | None, call: Call) -> None:
        """Keep decoded inputs for the computation that follows, while there is room."""
        size = sum(v.nbytes for _, v in call.parts() if isinstance(v, torch.Tensor))
        if self._kept_bytes + size <= _KEPT_BYTES:
            self._kept[index, variant] = call
            self._kept_bytes += size

    def call(self, index: int, variant: int | None) -> Call:
        """Return the arguments for one sample, kept or read."""
        kept = self._kept.get((index, variant))
        return kept if kept is not None else self.read(index, variant)[0]

    def release(self) -> None:
        """Let go of inputs that were kept."""
        self._kept, self._kept_bytes = {}, 0

    def check_repeatable(self, variant: int | None) -> None:
        """Read a few samples twice, and refuse a dataset that does not repeat itself.

        Raises:
            DataError: Two reads of one sample differ.
        """
        for index in range(min(_READ_TWICE, self.num_samples)):
            first, _ = self.read(index, variant)
            if content_digest(first) != content_digest(self.read(index, variant)[0]):
                raise DataError(
                    f"sample {index} of {type(self._dataset).__qualname__} differs each time "
                    "it is read: a stored result would freeze one of its values",
                    hint="give its random generator a fixed seed for each sample, or store "
                    "seeded variants drawn from the global generators",
                )


class ReadSource(ItemSource):
    """Nothing names the samples: each is read and hashed, at every run."""

    def __init__(self, dataset: Any, selection: Selection, reason: str) -> None:
        super().__init__(dataset, selection)
        self.how = f"every sample is read and hashed at each run: {reason}"
        self._rests: list[Any] | None = None
        _log.warning(
            "%s: %s; give it a method sample_key(i) to spare that",
            type(dataset).__qualname__, self.how,
        )  # fmt: skip

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        """Return the digest of each sample."""
        self.check_repeatable(variant)
        names = bytearray()
        rests: list[Any] = []
        for index in range(self.num_samples):
            call, rest = self.read(index, variant)
            names += content_digest(call)
            rests.append(rest)
            self.keep(index, variant, call)
        self._rests = rests
        return np.frombuffer(bytes(names), f"S{DIGEST_BYTES}")

    def rest(self, index: int) -> Any:
        """Return what passes through beside the features."""
        if self._rests is None:
            return self.read(index, None)[1]
        return self._rests[index]


class NamedSource(ItemSource):
    """Samples that have names, so that none needs to be read once its row and label are known.

    Args:
        dataset: Map-style.
        selection: What enters the module.
        names: A digest for each sample's inputs: what its rows are stored under.
        label_names: A digest for each sample as a whole: what its label is stored under.
        table: Where labels are stored.
        how: By what the samples are known.
        files: Digests of the files that the samples are, "S16"; None where they are no files.
    """

    def __init__(
        self,
        dataset: Any,
        selection: Selection,
        names: NDArray[np.bytes_],
        label_names: NDArray[np.bytes_],
        table: RowTable,
        how: str,
        files: NDArray[np.bytes_] | None = None,
    ) -> None:
        super().__init__(dataset, selection)
        self.how = how
        self._files = files
        self._names = names
        self._seeds = names
        self._label_names = label_names
        self._table = table
        self._labels: Labels | None = None
        self._rests: dict[int, Any] | None = None

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        """Return the digest of each sample."""
        if self._labels is None and self._rests is None:
            self._find_labels(variant)
        return self._names if variant is None else derived(self._names, f"variant:{variant}")

    def lineage(self, variant: int | None) -> list[Lineage]:
        """Return that variants were made from samples, and samples from files."""
        pairs = [] if variant is None else [(self.digests(variant), self._names)]
        if self._files is not None:
            pairs += [(self._names, self._files), (self._label_names, self._files)]
        return pairs

    def rest(self, index: int) -> Any:
        """Return what passes through beside the features."""
        if self._labels is not None:
            return self._labels.rest(index)
        if self._rests is not None and index in self._rests:
            return self._rests[index]
        return self.read(index, None)[1]

    def rests(self, indices: NDArray[np.int64]) -> Any:
        """Return what passes through for several samples, collated."""
        return super().rests(indices) if self._labels is None else self._labels.rests(indices)

    def _find_labels(self, variant: int | None) -> None:
        slots = located(self._table, self._label_names)
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            self.check_repeatable(variant)
            rests: dict[int, Any] = {}
            for index in missing.tolist():
                call, rests[index] = self.read(index, variant)
                self.keep(index, variant, call)
            rows = labels.encode(self._label_names[missing], list(rests.values()))
            if rows is None:
                _log.warning(
                    "labels of %s are no plain values of one shape: they are read with each "
                    "sample", type(self._dataset).__qualname__,
                )  # fmt: skip
                self._rests = rests
                return
            self._table.put(rows)
            slots = located(self._table, self._label_names)
            refuse_forgotten(np.flatnonzero(slots < 0))
        self._labels = labels.Labels(self._table, slots)


def refuse_forgotten(places: NDArray[np.int64]) -> None:
    """Refuse samples that were forgotten on request.

    Raises:
        DataError: There are some.
    """
    if len(places):
        raise DataError(
            f"{len(places)} samples were forgotten on request and are not stored again: "
            f"{', '.join(map(str, places[:5].tolist()))}{'...' if len(places) > 5 else ''}",
            hint="leave them out, with torch.utils.data.Subset",
        )


def located(table: RowTable, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Return where intact rows of these names are; -1 where there is none."""
    while True:
        slots = table.locate(names)
        if not len(table.damaged(slots[slots >= 0])):
            return slots


def keyed(
    dataset: Any, selection: Selection, folder: Path, sample_key: Callable[[int], object]
) -> Source:
    """Samples under keys that the dataset declares."""
    how = "samples are known by the keys that the dataset declares"
    kind = full_name(type(dataset))
    try:
        namespace = digest(("keys", kind, _behaviour(dataset), chosen(selection)))
    except UnhashableError as error:
        if callable(selection.inputs):
            return ReadSource(dataset, selection, error.message)
        # The keys alone decide then, which is what declaring them means.
        how += f"; the dataset's code does not count ({error.message})"
        namespace = digest(("keys", kind, chosen(selection)))
    names = named_digests(namespace, (sample_key(index) for index in range(len(dataset))))
    table = RowTable(folder / f"labels-{namespace[:32]}", namespace)
    return NamedSource(dataset, selection, names, names, table, how)


def _behaviour(dataset: Any) -> list[object]:
    """Return what decides how a sample is made: the class, and callables it was given."""
    parts = vars(dataset) if hasattr(dataset, "__dict__") else {}
    return [
        type(dataset),
        *(
            (name, value)
            for name, value in sorted(parts.items())
            if callable(value) and name != "sample_key"
        ),
    ]


def chosen(selection: Selection) -> object:
    """Return what names a selection in a digest."""
    return selection.inputs if callable(selection.inputs) else (repr(selection.inputs),)


# ---------------------------------------------------------------- folders of files


def is_folder(dataset: Any) -> bool:
    """Tell whether a dataset is laid out as torchvision's folders are."""
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list) or len(samples) != len(dataset) or not samples:
        return False
    first = samples[0]
    pair = isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], (str, os.PathLike))
    return pair and callable(getattr(dataset, "loader", None))


def image_folder(dataset: Any, selection: Selection, folder: Path) -> Source:
    """Samples under the content of their files."""
    how = "samples are known by the content of their files"
    try:
        namespace = digest(("files", *_behaviour(dataset), chosen(selection)))
    except UnhashableError as error:
        return ReadSource(dataset, selection, error.message)
    files = file_digests([os.fspath(path) for path, _ in dataset.samples], folder)
    names = named_digests(namespace, (name.hex() for name in files))
    label_names = named_digests(
        namespace,
        (
            (name.hex(), os.path.basename(path), target)
            for name, (path, target) in zip(files, dataset.samples, strict=True)
        ),
    )
    table = RowTable(folder / f"labels-{namespace[:32]}", namespace)
    contents = np.array([name[:DIGEST_BYTES] for name in files], f"S{DIGEST_BYTES}")
    return NamedSource(dataset, selection, names, label_names, table, how, contents)


def file_digests(paths: Sequence[str], folder: Path) -> list[bytes]:
    """Return the content digest of each file, reading only files that changed by their stat.

    A file whose path, size, times and inode are those of an earlier look is not read again.

    Args:
        paths: Of the files.
        folder: Where digests are kept between runs.
    """
    table = RowTable(folder / "files", "files")
    stats = [os.stat(path) for path in paths]
    names = named_digests(
        "stat",
        (
            (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            for path, stat in zip(paths, stats, strict=True)
        ),
    )
    slots = located(table, names)
    missing = np.flatnonzero(slots < 0)
    found = np.zeros((len(paths), 32), np.uint8)
    for place in missing.tolist():
        found[place] = np.frombuffer(bytes.fromhex(digest_file(paths[place])), np.uint8)
    known = np.flatnonzero(slots >= 0)
    if len(known):
        found[known] = table.take(slots[known])[0]
    settled = missing[np.array([is_settled(stats[i]) for i in missing.tolist()], np.bool_)]
    if len(settled):
        values = torch.from_numpy(found[settled])
        table.put(Rows(names[settled], (Column("", "uint8", (32,)),), (values,)))
    return [row.tobytes() for row in found]
