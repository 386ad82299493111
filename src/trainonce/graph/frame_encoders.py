"""Encodings of frames, Arrow data, Hugging Face datasets, tokenizers and configurations.

By content, and matched by name, so that none of these libraries is imported for being looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trainonce.graph.digest import Encoder, Handler


def _pandas_frame(encoder: Encoder, value: Any, path: str) -> None:
    encoder.head(b"r", 4 + value.shape[1])
    encoder.raw(b"s", b"pandas.DataFrame")
    _pandas_values(encoder, value.index, f"{path}.index")
    _pandas_values(encoder, value.columns, f"{path}.columns")
    encoder.value(dict(value.attrs), f"{path}.attrs")
    encoder.value(value.shape, path)
    for number in range(value.shape[1]):
        _pandas_values(encoder, value.iloc[:, number], f"{path}[{value.columns[number]!r}]")


def _pandas_series(encoder: Encoder, value: Any, path: str) -> None:
    encoder.head(b"r", 3)
    encoder.raw(b"s", b"pandas.Series")
    encoder.value(value.name, f"{path}.name")
    _pandas_values(encoder, value.index, f"{path}.index")
    _pandas_values(encoder, value, path)


def _pandas_index(encoder: Encoder, value: Any, path: str) -> None:
    encoder.head(b"r", 2)
    encoder.raw(b"s", b"pandas.Index")
    encoder.value(list(value.names), f"{path}.names")
    _pandas_values(encoder, value, path)


def _pandas_values(encoder: Encoder, value: Any, path: str) -> None:
    """One column or index: plain dtypes as arrays, everything else value by value."""
    names = list(value.names) if hasattr(value, "names") else None
    kind: Any = value.dtype
    encoder.value((str(kind), names), path)
    if hasattr(value, "get_level_values") and value.nlevels > 1:
        for level in range(value.nlevels):
            _pandas_values(encoder, value.get_level_values(level), f"{path}[{level}]")
        return
    if str(kind) == "category":
        encoder.value((np.asarray(value.array.codes), kind.ordered), path)
        _pandas_values(encoder, kind.categories, f"{path}.categories")
        return
    if isinstance(kind, np.dtype) and not kind.hasobject:
        encoder.value(np.asarray(value), path)
        return
    missing = np.asarray(value.isna())
    encoder.value(missing, path)
    if type(kind).__name__ in ("DatetimeTZDtype", "PeriodDtype"):
        encoder.value(np.asarray(value.array.asi8), path)
        return
    items = zip(value.array.astype(object), missing, strict=True)
    encoder.value([None if gone else item for item, gone in items], path)


def _pandas_moment(encoder: Encoder, value: Any, path: str) -> None:
    encoder.record(type(value).__name__, value.isoformat(), value.unit, str(value.tz), path=path)


def _arrow_table(encoder: Encoder, value: Any, path: str) -> None:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    table = value.combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    encoder.head(b"r", 1)
    encoder.raw(b"s", b"arrow.Table")
    encoder.raw(b"b", memoryview(sink.getvalue()))


def _arrow_array(encoder: Encoder, value: Any, path: str) -> None:
    import pyarrow as pa

    encoder.record("arrow.Array", pa.table([value], names=["values"]), path=path)


def _arrow_batch(encoder: Encoder, value: Any, path: str) -> None:
    import pyarrow as pa

    encoder.record("arrow.RecordBatch", pa.Table.from_batches([value]), path=path)


def _polars_series(encoder: Encoder, value: Any, path: str) -> None:
    encoder.record("polars.Series", value.to_frame(), path=path)


def _polars_frame(encoder: Encoder, value: Any, path: str) -> None:
    encoder.head(b"r", 1)
    encoder.raw(b"s", b"polars.DataFrame")
    _arrow_table(encoder, value.rechunk().to_arrow(), path)


def _hf_dataset(encoder: Encoder, value: Any, path: str) -> None:
    # Its own `_fingerprint` misses edits of helpers, so the content is read instead.
    indices = None if value._indices is None else value._indices.table
    layout = (str(value.features), dict(value.format), str(value.split))
    encoder.record("datasets.Dataset", layout, value.data.table, indices, path=path)


def _fast_tokenizer(encoder: Encoder, value: Any, path: str) -> None:
    settings = {key: str(item) for key, item in sorted(value.init_kwargs.items())}
    content = value.backend_tokenizer.to_str()
    mode = (value.padding_side, value.truncation_side, value.model_max_length)
    encoder.record("tokenizer", type(value), content, settings, mode, path=path)


def _tokenizer(encoder: Encoder, value: Any, path: str) -> None:
    encoder.record("tokenizers.Tokenizer", value.to_str(), path=path)


def _hf_config(encoder: Encoder, value: Any, path: str) -> None:
    encoder.record("config", type(value), value.to_dict(), path=path)


BY_NAME: dict[str, Handler] = {
    "pandas.DataFrame": _pandas_frame,
    "pandas.core.frame.DataFrame": _pandas_frame,
    "pandas.Series": _pandas_series,
    "pandas.core.series.Series": _pandas_series,
    "pandas.Timestamp": _pandas_moment,
    "pandas._libs.tslibs.timestamps.Timestamp": _pandas_moment,
    "pyarrow.lib.Table": _arrow_table,
    "pyarrow.lib.RecordBatch": _arrow_batch,
    "polars.dataframe.frame.DataFrame": _polars_frame,
    "polars.series.series.Series": _polars_series,
    "datasets.arrow_dataset.Dataset": _hf_dataset,
    "datasets.dataset_dict.DatasetDict": lambda e, v, p: e.record("DatasetDict", dict(v), path=p),
    "tokenizers.Tokenizer": _tokenizer,
}
# Base class -> handler, for families whose every member shares one complete state.
BY_BASE: dict[str, Handler] = {
    "transformers.tokenization_utils_fast.PreTrainedTokenizerFast": _fast_tokenizer,
    "transformers.tokenization_utils_tokenizers.TokenizersBackend": _fast_tokenizer,
    "transformers.configuration_utils.PretrainedConfig": _hf_config,
    "transformers.configuration_utils.PreTrainedConfig": _hf_config,
    "pandas.core.indexes.base.Index": _pandas_index,
    "pandas.Index": _pandas_index,
    "pyarrow.lib.Array": _arrow_array,
}
