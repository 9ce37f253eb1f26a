"""What is kept of an example beside its features, in parquet (`docs/store-format.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carv_attrib.errors import StoreCorruptError
from carv_attrib.files import atomic_file


@dataclass(frozen=True)
class Record:
    """What is kept of an example beside its features.

    Attributes:
        id: stable number of the example.
        key: readable name: a file name or row.
        label: class label.
        caption: text.
        thumbnail: PNG or JPEG of what the teacher saw; empty if the example was skipped.
        error: why the example was skipped, or None; a skipped example has no features.
    """

    id: int
    key: str
    label: int | None
    caption: str | None
    thumbnail: bytes
    error: str | None = None


def label_name(label: int | None, names: Sequence[str] | None) -> str | None:
    """Return the class name of a label where there is one, else its number."""
    if label is None:
        return None
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write a file of records, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("key", pa.string()),
            pa.field("label", pa.int64()),
            pa.field("caption", pa.string()),
            pa.field("thumbnail", pa.binary()),
            pa.field("error", pa.string()),
        ]
    )
    table = pa.Table.from_pylist([vars(record) for record in records], schema=schema)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file.

    Raises:
        StoreCorruptError: if the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
        return [Record(**row) for row in rows]
    except (OSError, pa.ArrowException, TypeError) as err:
        raise StoreCorruptError(
            f"{path} is damaged: {' '.join(str(err).split())}; delete it and featurize again."
        ) from err
