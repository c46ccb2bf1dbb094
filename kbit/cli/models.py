"""What demo, eval, generate and quantize share: finding MODEL, loading it in a format, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbit.cli.common import resolve_model

# What a model folder is downloaded with; "consolidated" files repeat the weights in another layout.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["consolidated*", "*/*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A model that can be loaded. name: as the user gave it. folder: on this machine. config: its config.json.
    saved_format: the format its weights are stored in already, or None for a floating point model."""

    name: str
    folder: Path
    config: dict[str, Any]
    saved_format: str | None


def open_source(model: str, *, saved_formats: bool = True) -> Source:
    """MODEL: "demo", a local folder or a hub name (downloaded, or taken from the cache).

    saved_formats: whether a model that is quantized already will do. Raises ValueError, one sentence, where not.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = _saved_format(folder, config)
    if saved is not None and not saved_formats:
        raise ValueError(f"{model} is quantized already ({saved}); give the floating point model it came from")
    return Source(model, folder, config, saved)


def _saved_format(folder: Path, config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method != "kbit":
        return str(method or "unknown")
    from kbit.config import KbitConfig

    try:
        return KbitConfig.from_dict(quantization).weight_format.label
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: quantization_config cannot be read ({error})") from None


def formats_for(source: Source, given: list[str] | None, default: list[str]) -> list[str]:
    """The formats to load: what was given, or the default; a quantized model comes in its own format only."""
    if source.saved_format is None:
        return given or default
    if given and given != [source.saved_format]:
        raise ValueError(
            f"{source.name} is stored as {source.saved_format} and cannot be loaded as {', '.join(given)}; "
            "leave the format out, or give the floating point model it came from"
        )
    return [source.saved_format]


def pick_device(device: str) -> str:
    """ "auto" is the GPU where torch has one, else the CPU. ValueError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:1") from None
    if kind.type not in ("cpu", "cuda", "xpu", "mps"):
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:1")
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no {device} here (kbit doctor says why); use --device cpu")
    return device


def load_model(source: Source, format_name: str, device: str = "cpu") -> Any:
    """The causal language model in bf16, its weights quantized while they load unless the format is bf16."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from kbit.checkpoint.bnb import kbit_config
    from kbit.config import KbitConfig

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kwargs: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "local_files_only": True,
        "trust_remote_code": False,  # left out, transformers asks on the terminal
        "use_safetensors": True,
    }
    if format_name != "bf16" and source.saved_format is None:
        kwargs["quantization_config"] = KbitConfig.from_format(format_name)
    if device != "cpu":
        kwargs["device_map"] = {"": device}
    if source.saved_format == "bitsandbytes":  # into kbit's own layers, whether or not a bitsandbytes is installed
        kwargs["quantization_config"] = kbit_config(source.config["quantization_config"])
    try:
        model = AutoModelForCausalLM.from_pretrained(str(source.folder), **kwargs)
    except ValueError as error:
        if "AutoModelForCausalLM" in str(error):
            kind = source.config.get("model_type")
            raise ValueError(f"{source.name} is a {kind} model, not a causal language model") from None
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"a weight file of {source.folder} is truncated, damaged or not a safetensors file ({error})"
            ) from None
        raise
    return model.eval()


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer. ValueError where its folder has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source.folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing files, missing packages, broken JSON: many types, one meaning
        if "trust_remote_code" in str(error):
            raise
        raise ValueError(
            f"{source.name} has no tokenizer that can be read: {' '.join(str(error).split())[:300]}"
        ) from None


def read_text(path: str | Path) -> str:
    """A text file in UTF-8. ValueError, one sentence, for anything else."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a text file")
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def reference_reader(source: Source) -> tuple[Any, Callable[[str], Any]]:
    """The checkpoint, open, and a function from a weight's key to its bf16 tensor (None where it has no such key).

    So the error of quantized weights is measured without a second model in memory.
    """
    import torch

    from kbit.checkpoint import CheckpointReader

    reader = CheckpointReader(source.folder)

    def read(key: str) -> Any:
        # Checkpoints are written with or without the prefix of the base model.
        bare = key.partition(".")[2]
        found = next((k for k in (key, bare, f"model.{key}", f"transformer.{key}") if k in reader), None)
        tensor = None if found is None else reader.read(found)
        return tensor.to(torch.bfloat16) if tensor is not None and tensor.is_floating_point() else None

    return reader, read


def line_writer(tokenizer: Any, prompt: str, new_tokens: int) -> Callable[[Any], tuple[str, int]]:
    """A function that has a model continue `prompt` with its likeliest tokens: (text on one line, tokens written)."""

    def write(model: Any) -> tuple[str, int]:
        import torch

        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=1,
                do_sample=False,
                repetition_penalty=1.2,
                pad_token_id=pad_token(tokenizer, model),
            )
        new = out[0, ids.shape[1] :]
        return " ".join(tokenizer.decode(new, skip_special_tokens=True).split()), new.numel()

    return write


def pad_token(tokenizer: Any, model: Any) -> int:
    """A single sequence needs no padding, but `generate` wants to be told."""
    candidates = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        getattr(model.generation_config, "eos_token_id", None),
    )
    found = next((c for c in candidates if c is not None), 0)
    return found[0] if isinstance(found, list) else found


def machine_facts() -> tuple[dict[str, str], dict[str, str]]:
    """What a report says about where it was made: the machine, and the versions of the libraries."""
    import platform

    import torch

    import kbit
    from kbit.plan import machine

    facts = {device.name: f"{device.model}; {device.details}" for device in machine.devices()}
    facts |= {"system": f"{platform.system()} {platform.machine()}", "torch threads": str(torch.get_num_threads())}
    versions = {"kbit": kbit.__version__, "python": platform.python_version()}
    versions |= {name: version for name, version in machine.versions().items() if version}
    return facts, versions
