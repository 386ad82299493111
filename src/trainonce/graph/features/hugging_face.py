"""Hugging Face datasets: Arrow tables whose columns are known by content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import DataError, UnhashableError
from trainonce.graph.digest import digest
from trainonce.graph.features.items import (
    ItemSource,
    ReadSource,
    chosen,
    file_digests,
    located,
)
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.samples import derived, named_digests
from trainonce.graph.features.segments import DIGEST_BYTES, Column, Rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.selection import Selection
    from trainonce.graph.features.source import Lineage, Source


def hugging_face(dataset: Any, selection: Selection, folder: Path) -> Source:
    """Rows of Arrow tables, by the stored content of the columns that enter the module."""
    keys = selection.keys()
    columns = dataset.column_names if callable(selection.inputs) else [str(key) for key in keys]
    if selection.inputs is None or not set(columns) <= set(dataset.column_names):
        raise DataError(
            f"which of the columns {dataset.column_names} enters the module?",
            hint='name it, for example features(..., inputs="image")',
        )
    try:
        # The format decides what a stored value becomes, transforms included.
        layout = digest((str(dataset.features), dataset.format["type"],
                         dataset.format["format_kwargs"], chosen(selection)))  # fmt: skip
    except UnhashableError as error:
        return ReadSource(dataset, selection, error.message)
    whole = f"{layout}{_table_name(dataset, folder)}"
    table = RowTable(folder / "maps", "maps")
    name = named_digests("huggingface", [whole])
    slots = located(table, name)
    if slots[0] < 0:
        names = _arrow_rows(dataset, list(columns), layout)
        data = torch.from_numpy(np.frombuffer(names.tobytes(), np.uint8).copy())
        table.put(Rows(name, (Column("", "uint8", (), ragged=True),), ([data],)))
        slots = located(table, name)
    names = np.frombuffer(table.take(slots)[0][0].numpy().tobytes(), f"S{DIGEST_BYTES}")
    how = "samples are known by the stored content of their columns"
    return _ColumnSource(dataset, selection, names, how)


class _ColumnSource(ItemSource):
    def __init__(
        self, dataset: Any, selection: Selection, names: NDArray[np.bytes_], how: str
    ) -> None:
        super().__init__(dataset, selection)
        self.how = how
        self._names = names
        self._seeds = names
        taken = selection.keys()
        self._others = dataset.select_columns(
            [column for column in dataset.column_names if column not in taken]
        )

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        return self._names if variant is None else derived(self._names, f"variant:{variant}")

    def lineage(self, variant: int | None) -> list[Lineage]:
        return [] if variant is None else [(self.digests(variant), self._names)]

    def rest(self, index: int) -> Any:
        return dict(self._others[index]) if self._others.column_names else {}


def _table_name(dataset: Any, folder: Path) -> str:
    """Return what the dataset's tables hold: by their files, or by content in memory."""
    files = [str(entry["filename"]) for entry in dataset.cache_files]
    indices = dataset._indices
    chosen = "" if indices is None else digest(indices.table)
    if files:
        return chosen + "".join(name.hex() for name in file_digests(files, folder))
    return chosen + digest(dataset.data.table)


def _arrow_rows(dataset: Any, columns: list[str], layout: str) -> NDArray[np.bytes_]:
    plain = dataset.select_columns(columns).with_format("arrow")
    values = (
        row for start in range(0, len(plain), 1024)
        for row in plain[start : start + 1024].to_pylist()
    )  # fmt: skip
    return named_digests(layout, values)
