"""What the commands share: reading MODEL, formats and sizes from the command line; printing tables, bytes and JSON."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WEIGHT_FORMATS = ("bf16", "int8", "nf4", "nf4-plain", "fp4", "fp4-plain")

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# ---- reading ----


def parse_memory(text: str) -> int:
    """Bytes from "12GB" (10^9), "12GiB" (2^30), "12000MB", "12 GB" or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a memory size; write for example 12GB, 11.5GiB or 12000MB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"{text!r} is no memory at all; write for example 12GB")
    return size


def parse_params(text: str) -> int:
    """A number of parameters from "7B", "350M", "1.5B" or "7000000000"."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMbBtT]?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number of parameters; write for example 7B or 350M")
    return int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2].lower()])


def parse_formats(text: str, known: Sequence[str] = WEIGHT_FORMATS) -> list[str]:
    """Format names from "bf16,int8,nf4", each once, in the order given. ValueError names what is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}; known: {', '.join(known)}")
    if not names:
        raise ValueError(f"no format given; known: {', '.join(known)}")
    return names


def resolve_model(model: str, *, weights: bool = True) -> str:
    """MODEL as `from_pretrained` takes it: a local model folder, or a hub name whose config.json can be had.

    "demo" is the model that ships with kbit, unless there is a folder of that name.

    weights: the folder has to hold weights too (safetensors), not only a config.json.

    Raises ValueError, one sentence, for a path that does not exist, a file, a folder without a model, and a model that
    is Python code of its own: that is never run.
    """
    path = Path(model).expanduser()
    if model == "demo" and not path.is_dir():
        from kbit.assets import demo_model

        path = Path(demo_model())
    if path.is_dir():
        _check_folder(path, weights)
        return str(path)
    if path.exists():
        raise ValueError(f"{model} is a file; give the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model):
        raise ValueError(f"there is no folder {model}; give a local model folder or a hub name such as org/name")
    _check_hub(model)
    return model


def _check_folder(path: Path, weights: bool) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    _check_config(config, str(path))
    stored = [file for kind in ("", ".index.json") for file in sorted(path.glob(f"*.safetensors{kind}"))]
    for file in stored if weights else ():
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file} cannot be read: its permissions do not let you, or it is a link to nothing")
    if stored or not weights:
        return
    pickled = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{suffix}"))
    if pickled:
        raise ValueError(
            f"{path} holds pickled weights only ({pickled[0]}), which can run code when they are read; "
            "convert the model to safetensors first (save_pretrained writes it)"
        )
    raise ValueError(f"{path} has a config.json but no weights (*.safetensors)")


def _check_config(config: Path, name: str) -> None:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not valid JSON ({error})") from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise ValueError(f"{config} is not a model's config: it has no model_type")
    if data.get("auto_map"):
        # Many a model carries code from the time before transformers knew its type; then transformers' own is taken.
        from transformers import CONFIG_MAPPING

        if data["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} is Python code of its own (auto_map in config.json), which kbit never runs; "
                f"transformers has no model type {data['model_type']!r}"
            )


def _check_hub(name: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            # One request: a download of what is not there, such as a misspelt folder, tries for half a minute.
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
        config = hf_hub_download(name, "config.json")
    except Exception as error:  # whatever the network or the hub answers
        raise ValueError(
            f"{name} is neither a local folder nor a model that the hub gave out ({type(error).__name__}); "
            "check the name, the network, and access to gated models"
        ) from None
    _check_config(Path(config), name)


# ---- printing ----


def format_bytes(size: float) -> str:
    """Bytes for people, in powers of ten as memory is sold: "13.5 GB"."""
    if size <= 0:
        return "0 B"
    power = min(int(math.log10(size)) // 3, 4)
    # 999.96 kB would round to 1000.0 kB.
    if power < 4 and round(size / 1000**power, 1) >= 1000:
        power += 1
    return f"{size / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def print_json(data: Any) -> None:
    """What `--json` prints: one JSON document and nothing else on stdout. Non-finite numbers become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout, never cut off: in a pipe it is as wide as it has to be.

    columns: headers; one that starts with ">" is set flush right. Cells are printed as they are, not as markup.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    console.print(table)


def progress(description: str, total: int) -> tuple[Any, Callable[[int], None]]:
    """A progress bar on stderr: `bar, advance = progress("evaluating", 10)`, then `with bar: advance(1)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(description, total=total)
    return bar, lambda steps: bar.update(task, advance=steps)
