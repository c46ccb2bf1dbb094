"""safetensors checkpoints, one tensor at a time, in and out.

The safetensors library writes a file from a dictionary that holds all of it. Here tensors are written as they come:
each goes to a spool file of its item size, and a finished shard is its header followed by the spools from wide to
narrow, which is the library's own order and keeps every tensor aligned. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COPY_CHUNK = 2**20
# Bytes of one tensor that become a Python bytes object at once.
_WRITE_CHUNK = 2**20

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointReader:
    """The tensors of a model folder: `model.safetensors`, or shards with their index.

    `keys()` and `items()` go in the order in which the files hold the tensors. A tensor is read when it is asked for;
    only the file that is being read is mapped.

    Raises ValueError, with the file in it, for a folder without safetensors weights, a broken index, a shard that is
    missing, truncated or lacks a key that the index promises, and FileNotFoundError where there is no folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}")
        self._handle: Any = None
        self._open_file = ""
        self.file_of: dict[str, str] = {}
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            self._add_file(SINGLE, None)
        elif index.is_file():
            self._read_index(index)
        else:
            raise ValueError(self._no_weights())
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self.file_of.values()))

    def path_of(self, key: str) -> Path:
        return self.folder / self.file_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._handle_of(key).get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU. Its bytes may be mapped from the file: it is valid while this reader is open."""
        try:
            return self._handle_of(key).get_tensor(key)
        except Exception as error:  # the library's own error type, and whatever torch says of a dtype
            raise ValueError(f"{self.path_of(key)}: cannot read {key} ({_one_line(error)})") from None

    def keys(self) -> list[str]:
        return list(self.file_of)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.file_of:
            yield key, self.read(key)

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def __len__(self) -> int:
        return len(self.file_of)

    def __contains__(self, key: object) -> bool:
        return key in self.file_of

    def close(self) -> None:
        """Unmap the file that is open."""
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
        self._handle, self._open_file = None, ""

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _handle_of(self, key: str) -> Any:
        file = self.file_of[key]
        if self._open_file != file:
            self._open(file)
        return self._handle

    def _open(self, file: str) -> None:
        from safetensors import safe_open

        self.close()
        path = self.folder / file
        try:
            self._handle = safe_open(str(path), framework="pt", device="cpu").__enter__()
        except FileNotFoundError:
            if path.exists():  # safetensors says the same of both
                raise ValueError(f"{path} cannot be read: its permissions do not let you") from None
            raise ValueError(f"{path} is missing, though {INDEX} lists it: the download is incomplete") from None
        except OSError:
            raise
        except Exception as error:  # SafetensorError, which the library does not export everywhere
            raise ValueError(
                f"{path} is truncated, damaged or not a safetensors file ({_one_line(error)}): fetch it again"
            ) from None
        self._open_file = file

    def _add_file(self, file: str, wanted: list[str] | None) -> None:
        self._open(file)
        present = (
            list(self._handle.offset_keys()) if hasattr(self._handle, "offset_keys") else list(self._handle.keys())
        )
        if wanted is not None:
            missing = sorted(set(wanted) - set(present))
            if missing:
                raise ValueError(f"{self.folder / file} does not hold {missing[0]}, though {INDEX} says so")
            present = [key for key in present if key in set(wanted)]
        self.file_of.update(dict.fromkeys(present, file))

    def _read_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str]] = {}
            for key, file in weight_map.items():
                files.setdefault(file, []).append(key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a checkpoint index ({_one_line(error)})") from None
        for file in files:
            # An index is untrusted input: it may only name files that lie beside it.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index} lists {file!r}, which is not a safetensors file in the same folder")
        missing = [file for file in sorted(files) if not (self.folder / file).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.folder / missing[0]}{more} is missing, though {INDEX} lists it: the download is incomplete"
            )
        for file in sorted(files):
            self._add_file(file, files[file])

    def _no_weights(self) -> str:
        pickled = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if pickled:
            return (
                f"{self.folder} holds pickled weights only ({pickled[0].name}), which can run code when they are read: "
                "convert the model to safetensors first (save_pretrained writes it)"
            )
        return f"{self.folder} holds no {SINGLE} and no {INDEX}: it is not a model folder with weights"


class CheckpointWriter:
    """Writes `model.safetensors`, or numbered shards with an index, into an existing folder.

    max_shard_size: a shard is closed before a tensor would take its data beyond so many bytes (a larger tensor gets a
    shard of its own). `add` writes a tensor at once and keeps no reference to it; `finish` writes the last shard and
    the index and returns the names of the files. Without `finish` nothing is readable.
    """

    def __init__(self, folder: str | Path, max_shard_size: int = 5_000_000_000) -> None:
        if max_shard_size < 1:
            raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
        self.folder = Path(folder)
        self.max_shard_size = max_shard_size
        self.nbytes = 0
        self._shards: list[list[str]] = []
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}  # key -> dtype, shape, item size, bytes
        self._seen: set[str] = set()
        self._spools: dict[int, IO[bytes]] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor. Raises ValueError for a key that was written before or a dtype that files do not have."""
        if key in self._seen:
            raise ValueError(f"{key} would be written twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{key} has dtype {tensor.dtype}, which safetensors files do not have")
        size = tensor.numel() * tensor.element_size()
        if self._entries and self._shard_bytes() + size > self.max_shard_size:
            self._close_shard()
        width = tensor.element_size()
        if width not in self._spools:
            self._spools[width] = (self.folder / f".spool-{width}").open("w+b")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, size, _WRITE_CHUNK):
            self._spools[width].write(flat[begin : begin + _WRITE_CHUNK].numpy().tobytes())
        self._seen.add(key)
        self._entries[key] = (_DTYPE_NAMES[tensor.dtype], list(tensor.shape), width, size)
        self.nbytes += size

    def finish(self) -> list[str]:
        """Write what is left and give the files their names."""
        if self._entries or not self._shards:
            self._close_shard()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for i, name in enumerate(names):
            os.replace(self.folder / f".shard-{i}", self.folder / name)
        if count > 1:
            weight_map = {key: names[i] for i, keys in enumerate(self._shards) for key in keys}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return names

    def close(self) -> None:
        """Let go of open files; what was not finished stays unreadable."""
        for spool in self._spools.values():
            spool.close()
        self._spools = {}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _shard_bytes(self) -> int:
        return sum(entry[3] for entry in self._entries.values())

    def _close_shard(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        widths = sorted(self._spools, reverse=True)
        for width in widths:
            for key, (dtype, shape, item, size) in self._entries.items():
                if item == width:
                    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
                    offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self.folder / f".shard-{len(self._shards)}").open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for width in widths:
                spool = self._spools.pop(width)
                spool.seek(0)
                shutil.copyfileobj(spool, out, _COPY_CHUNK)
                spool.close()
                (self.folder / f".spool-{width}").unlink()
            out.flush()
            os.fsync(out.fileno())
        self._shards.append(list(self._entries))
        self._entries = {}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
