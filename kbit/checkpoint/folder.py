"""Write a model folder so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Weights and their indexes, in every serialization: what a copy of a model folder leaves behind.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".data"}
_COPIED_FOLDERS = {"additional_chat_templates"}


@contextmanager
def new_folder(out: str | Path, force: bool = False, keep_off: str | Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` to write into; it becomes `out` on leaving, and vanishes if that fails.

    force: replace an existing `out`, which must be a model folder (it has a config.json) or empty. keep_off: a folder
    that must not be replaced, because it is being read.

    Raises ValueError where `out` exists, must not be replaced or cannot be written.
    """
    out = Path(os.path.abspath(out))
    check_out(out, force, keep_off)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise _not_writable(out, error) from None
    try:
        yield temporary
        # mkdtemp gives a folder that only its owner can enter; a model folder is an ordinary one.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        check_out(out, force, keep_off)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.replace(out, old)
            try:
                os.replace(temporary, out)
            except BaseException:
                os.replace(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: str | Path, force: bool = False, keep_off: str | Path | None = None) -> None:
    """ValueError where a result may not, or cannot, be written to `out`: see `new_folder`."""
    out = Path(os.path.abspath(out))
    if keep_off is not None:
        source = Path(keep_off).resolve()
        if out.resolve() == source or out.resolve() in source.parents:
            raise ValueError(f"{out} is or holds the model that is being read; give another place for the result")
    check_writable(out)
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ValueError(f"{out} exists already; give another place, or --force to replace it")
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"{out} is not a folder, so it is not replaced; remove it yourself or give another place")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out} holds files but no config.json: it is not a model folder and is not replaced")


def check_writable(out: str | Path) -> None:
    """ValueError where no folder `out` can be made. It is tried: permissions tell nothing of a read-only disk."""
    out = Path(os.path.abspath(out))
    parent = next(p for p in out.parents if p.exists() or p.is_symlink())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=parent))
    except OSError as error:
        raise _not_writable(out, error) from None


def _not_writable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"{out} cannot be written ({error.strerror}); give a place where you may create a folder")


def copy_side_files(source: Path, out: Path) -> list[str]:
    """Copy what belongs to a model beside its weights and config.json: tokenizer, generation settings, model card.

    Returns the names of what was copied, sorted.
    """
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name.startswith(".") or name == "config.json":
            continue
        if path.is_dir():
            if name in _COPIED_FOLDERS:
                shutil.copytree(path, out / name)
                copied.append(name)
            continue
        if path.suffix in _WEIGHT_SUFFIXES or name.endswith(".index.json"):
            continue
        shutil.copyfile(path, out / name)
        copied.append(name)
    return copied
