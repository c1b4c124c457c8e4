"""Random access to the rows of Parquet files, in constant memory: a small cache of decoded row groups."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffalign.data._files import open_binary, split_of_name, stamp
from diffalign.types import UserError

HUGE = 512 * 2**20  # bytes of a decoded row group from which random access hurts
NUM_GROUPS = 2  # decoded row groups kept


class ParquetRows:
    """The rows of several Parquet files, one after the other.

    `needed` are columns every file must have, `light` are columns (the needed and optional ones) that hold no image
    bytes: a light row has those only. "images/path" in `light` stands for the path inside the list of image structs.

    Raises:
        UserError: a file that is empty, not Parquet, or lacks a needed column.
    """

    def __init__(self, files: Sequence[str], needed: Sequence[str], light: Sequence[str]) -> None:
        self.files, self._light = list(files), tuple(light)
        starts, places, offsets = [0], [], [0]
        for number, file in enumerate(self.files):
            metadata = self._checked(file, needed)
            for group in range(metadata.num_row_groups):
                places.append((number, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
                self._warn_huge(file, metadata.row_group(group).total_byte_size)
            offsets.append(starts[-1])
        if starts[-1] == 0:
            raise UserError(f"{self.files[0]}: no rows in it{' nor in the files beside it' if files[1:] else ''}")
        self._starts, self._offsets, self._places = np.array(starts), np.array(offsets), places
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._is_warned = False

    def _warn_huge(self, file: str, size: int) -> None:
        if size > HUGE and not getattr(self, "_is_warned", False):
            self._is_warned = True
            warnings.warn(
                f"{file}: a row group of {size / 2**20:.0f} MiB is read whole for one row; train from the cache, "
                "or rewrite the file with a script of datasets_prep",
                stacklevel=4,
            )

    @staticmethod
    def _checked(file: str, needed: Sequence[str]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open_binary(file) as handle:
            if handle.seek(0, 2) == 0:
                raise UserError(f"{file}: the file is empty")
            handle.seek(0)
            try:
                parquet = pq.ParquetFile(handle)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0][:120]})") from error
            names = parquet.schema_arrow.names
            for column in needed:
                if column not in names:
                    raise UserError(f"{file}: no column {column!r}; it has {', '.join(names)}")
            return parquet.metadata

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}  # workers decode their own row groups

    def _group(self, number: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        file_number, group = self._places[number]
        while len(self._groups) >= NUM_GROUPS:  # before the read: the peak is what counts
            self._groups.popitem(last=False)
        file = self.files[file_number]
        try:
            with open_binary(file) as handle:
                table = pq.ParquetFile(handle).read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: row group {group} is damaged ({str(error).splitlines()[0][:120]})") from error
        self._groups[number] = table
        return table

    def where(self, index: int) -> tuple[str, int]:
        """The file of row `index` and its number in that file, from 0."""
        number = int(np.searchsorted(self._offsets, index, "right")) - 1
        return self.files[number], index - int(self._offsets[number])

    def _with_split(self, row: dict[str, Any], file: str) -> dict[str, Any]:
        if row.get("split") is None:
            row["split"] = split_of_name(file)
        return row

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` with all its columns."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        row = self._group(number).slice(index - int(self._starts[number]), 1).to_pylist()[0]
        return self._with_split(row, self.where(index)[0])

    def light(self) -> Iterator[dict[str, Any]]:
        """All rows in order, with their light columns only."""
        import pyarrow.parquet as pq

        for file in self.files:
            with open_binary(file) as handle:
                parquet = pq.ParquetFile(handle)
                leaves = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)]
                columns = [name for name in parquet.schema_arrow.names if name in self._light]
                if "images/path" in self._light:
                    columns += [leaf for leaf in leaves if leaf.startswith("images.") and leaf.endswith(".path")]
                for batch in parquet.iter_batches(1024, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        yield self._with_split(row, file)

    def stamps(self) -> Iterator[str]:
        """What the files are recognised by."""
        return (stamp(file) for file in self.files)
