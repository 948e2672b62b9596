"""Helpers for columns of Arrow tables and for Parquet files."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64

from worldloom.core.errors import DataError, one_line
from worldloom.core.files import storage_errors, write_atomic


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column contains lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column contains numbers or booleans."""
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Return whether a column contains integers or booleans, or lists of them."""
    kind = kind.value_type if is_list(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column contains text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a column contains bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def numbers(column: pa.ChunkedArray, name: str, where: str) -> Float64[np.ndarray, "R n"]:
    """Return a column of numbers, or of number lists of one length, as an array (R, n); missing values become NaN.

    Raises:
        DataError: the column contains something else, or lists of different lengths.
    """
    whole, kind, size = column.combine_chunks(), column.type, 1
    if is_list(kind):
        lengths = pc.list_value_length(whole).to_numpy(zero_copy_only=False)
        known = np.unique(lengths[np.isfinite(lengths)]).astype(int)
        if len(known) > 1:
            row = int(np.flatnonzero(lengths != lengths[0])[0])
            raise DataError(
                f"{where}: the lists of column {name!r} have {known[0]} to {known[-1]} values (row {row} differs from "
                f"row 0); expected lists of the same length in all rows. Repair the rows"
            )
        size = int(known[0]) if len(known) else int(getattr(kind, "list_size", 1))
        kind = kind.value_type
        if whole.null_count:
            rows = [[np.nan] * size if row is None else row for row in whole.to_pylist()]
            whole = pa.array(np.array(rows, np.float64).reshape(-1)) if is_number(kind) else whole
        else:
            whole = whole.flatten()
    if not (is_number(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"{where}: column {name!r} is {column.type}{_example(whole)}; expected numbers, or lists of numbers. "
            f"Convert the column"
        )
    values: np.ndarray = whole.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values.reshape(len(column), size)


def _example(values: pa.Array) -> str:
    """Return the end of an error message, with the first text that is not a number; empty if there is no such text."""
    texts = (value for value in values.slice(0, 1000).to_pylist() if isinstance(value, str))
    odd = next((text for text in texts if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text)), None)
    return "" if odd is None else f", for example {odd[:40]!r}"


@contextmanager
def table_errors(path: Path, kind: str) -> Iterator[None]:
    """Convert Arrow's errors on `path` to worldloom's errors; `kind` names the expected file type."""
    try:
        with storage_errors(path):
            yield
    except pa.ArrowMemoryError:
        raise  # the file is not damaged
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind} ({one_line(error)}); restore the file from a copy") from error


def write_parquet(path: Path, table: pa.Table, **options: int) -> None:
    """Write a Parquet file atomically."""
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, **options))
