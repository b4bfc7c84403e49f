"""Rows of Parquet files, of folders written by ``datasets``' ``save_to_disk``, and of the Hugging Face Hub.

``datasets`` and ``pyarrow`` are imported when they are needed; both come with ``pip install 'zoengine[data]'``.
"""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from zoengine.data.table import DataError

LOCAL = ".jsonl, .json, .csv, .tsv, .parquet, or a folder written by datasets' save_to_disk"
_DICT, _STATE = "dataset_dict.json", "state.json"


def parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        DataError: pyarrow is missing, or the file cannot be read.
    """
    library = _library("pyarrow.parquet", str(path))
    try:
        return library.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise DataError(f"{path}: not a Parquet file that can be read: {_line(error)}") from error


def saved(folder: Path, splits: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """(name, rows) of a data set that ``save_to_disk`` wrote; of several splits, the first of ``splits`` it has.

    Raises:
        DataError: ``datasets`` is missing, no such folder or split, or a file in it that cannot be read, named.
    """
    if not any((folder / name).is_file() for name in (_DICT, _STATE)):
        raise DataError(
            f"{folder}: not a folder written by datasets' save_to_disk (no {_DICT} and no {_STATE} in it); "
            "of a folder with other files, give one of those"
        )
    library = _library("datasets", str(folder))
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise DataError(f"{_damaged(folder)}: cannot be read: {_line(error)}") from error
    name, data = _pick(found, splits, str(folder))
    try:
        return name, data.to_list()
    except Exception as error:
        raise DataError(f"{_damaged(folder)}: cannot be read: {_line(error)}") from error


def hub(place: str, splits: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """(name, rows) of ``PATH`` or ``PATH:CONFIG`` on the Hub, or in its cache; the first of ``splits`` it has.

    Only data is loaded, never code from the repository.

    Raises:
        DataError: ``datasets`` is missing, the Hub cannot be reached, or there is no such data set, config or split.
    """
    path, _, config = place.partition(":")
    name = f"hub:{place}"
    library = _library("datasets", name)
    try:
        only = splits[0] if len(splits) == 1 else None
        with _offline_without_a_network():
            found = library.load_dataset(path, config or None, split=only)
        if only is None:
            only, found = _pick(found, splits, name)
        return only, found.to_list()
    except DataError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, their HTTP client, the file system
        what = f" (split {only!r})" if only else ""
        raise DataError(
            f"{name}{what}: cannot be loaded from the Hub: {type(error).__name__}: {_line(error)}. "
            f"Where the Hub is out of reach, give a local copy with the same columns instead: {LOCAL}"
        ) from error


@contextmanager
def _offline_without_a_network() -> Iterator[None]:
    """The Hub client's offline mode where its host has no address.

    Its cache is used as ever, but what is not in there fails at once and not after 40 seconds of new attempts.
    """
    constants = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _pick(found: Any, splits: Sequence[str], place: str) -> tuple[str, Any]:
    if not isinstance(found, Mapping):
        return "", found
    for split in splits:
        if split in found:
            return split, found[split]
    if not splits and len(found) == 1:
        return next(iter(found.items()))
    asked = f"no split {' or '.join(map(repr, splits))}" if splits else "several splits, and none is asked for"
    raise DataError(f"{place}: {asked}; splits there: {', '.join(found)}")


def _damaged(folder: Path) -> Path:
    """The file that is to blame for a folder that cannot be read, or the folder where none is found."""
    ipc = importlib.import_module("pyarrow").ipc
    parts = [folder]
    try:
        if (folder / _DICT).is_file():
            parts = [folder / name for name in json.loads((folder / _DICT).read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError, OSError):
        return folder / _DICT
    for part in parts:
        for name in (_STATE, "dataset_info.json"):
            try:
                state = json.loads((part / name).read_text(encoding="utf-8"))
            except (ValueError, OSError):
                return part / name
            for file in state.get("_data_files", []):
                try:
                    with ipc.open_stream(str(part / file["filename"])) as stream:
                        stream.read_all()
                except (ValueError, OSError):
                    return part / file["filename"]
    return folder


def _library(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{place}: reading it needs {name.partition('.')[0]}, which is not installed: pip install 'zoengine[data]'"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
