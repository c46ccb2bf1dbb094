"""Quantize a checkpoint on disk into another one, tensor by tensor, without building the model.

What is quantized is decided by the rule that conversion and loading use, on a meta-device model made from config.json.
The result is what `save_pretrained` writes after quantizing at load time: `<module>.weight`, `.absmax`,
`.nested_absmax` and `.nested_offset` as the modules hold them, and `quantization_config` in config.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbit.checkpoint.folder import check_out, copy_side_files, new_folder
from kbit.checkpoint.stream import CheckpointReader, CheckpointWriter
from kbit.config import KbitConfig, parse_dtype
from kbit.nn.base import to_parts
from kbit.nn.select import is_conv1d, matches, select_experts, select_modules, tied_groups
from kbit.ops import quantize

LAYOUTS = ("native", "bitsandbytes")
DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class QuantizeSummary:
    """out: the new folder. format, layout: of the weights. quantized: weights that were quantized. copied: tensors that
    were not. source_bytes, nbytes: of all tensors before and after. files: the weight files. seconds: wall time."""

    out: str
    format: str
    layout: str
    quantized: int
    copied: int
    source_bytes: int
    nbytes: int
    files: list[str]
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """weights: checkpoint key -> (module name, whether it is stored [K, N]). names: checkpoint key -> key in the
    result. dropped: keys that a tied weight makes superfluous. dtype: what loading would cast the weights to."""

    weights: dict[str, tuple[str, bool]]
    names: dict[str, str]
    dropped: set[str]
    dtype: torch.dtype | None


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: KbitConfig,
    *,
    layout: str = "native",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeSummary:
    """Write a quantized copy of the model folder `source` to `out`.

    source: a transformers model folder with safetensors weights, in one file or sharded. out: the new folder; it
        appears when it is complete, and a failure leaves nothing behind.
    config: what and how. layout: "native" or "bitsandbytes" (keys and bytes of bitsandbytes 0.50).
    max_shard_size: bytes of tensors a weight file. force: replace an existing model folder `out`.
    progress: called with (tensors done, tensors in all) after each.

    The memory in use is one tensor and its codes. Raises ValueError (FileNotFoundError for a folder that is not there)
    with the file and key in it for whatever cannot be read, quantized or written.
    """
    started = time.perf_counter()
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    source = Path(source)
    raw = read_config(source)
    check_out(out, force, keep_off=source)
    if layout == "bitsandbytes":
        from kbit.checkpoint import bnb

        bnb.check_config(config)
    with CheckpointReader(source) as reader:
        model = meta_model(source, raw)
        plan = _plan(model, reader, config, raw)
        keys = reader.keys()
        source_bytes = 0
        with new_folder(out, force, keep_off=source) as folder, CheckpointWriter(folder, max_shard_size) as writer:
            for done, key in enumerate(keys, start=1):
                if key in plan.dropped:
                    continue
                tensor = reader.read(key)
                source_bytes += tensor.nbytes
                for name, part in _converted(key, tensor, plan, config, layout, reader):
                    writer.add(name, part)
                del tensor
                if progress is not None:
                    progress(done, len(keys))
            files = writer.finish()
            copy_side_files(source, folder)
            if layout == "native":
                raw["quantization_config"] = config.to_dict()
            else:
                raw["quantization_config"] = bnb.config_dict(config, _skipped(model, plan))
            text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            nbytes = writer.nbytes
    quantized = len(plan.weights)
    return QuantizeSummary(
        str(out),
        config.weight_format.label,
        layout,
        quantized,
        len(keys) - quantized - len(plan.dropped),
        source_bytes,
        nbytes,
        files,
        time.perf_counter() - started,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a floating point model. ValueError where there is none, or the model is quantized already."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(f"{path} is not a model's config: it has no model_type")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unnamed method")
        raise ValueError(f"{folder} is quantized already ({method}): quantize the floating point model it came from")
    return raw


def meta_model(folder: Path, raw: dict[str, Any]) -> nn.Module:
    """The transformers model that config.json describes, on the meta device: its module tree and no values.

    Raises ValueError for an architecture that the installed transformers does not have; code in the folder never runs.
    """
    import transformers

    names = raw.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if names and cls is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {names[0]}, which {folder}/config.json asks for"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # its validators raise many types
        raise ValueError(f"transformers cannot read {folder}/config.json: {' '.join(str(error).split())}") from None
    with torch.device("meta"):
        if cls is not None:
            return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)


def _plan(model: nn.Module, reader: CheckpointReader, config: KbitConfig, raw: dict[str, Any]) -> _Plan:
    fused = select_experts(model, config)
    if fused:
        raise ValueError(
            f"{next(iter(fused))} and its like are fused from the weights of single experts, which is not done file by "
            "file: load the model with from_pretrained(..., quantization_config=KbitConfig(...)) and save it with "
            "save_pretrained, or leave the experts as they are (--skip experts)"
        )
    selected = select_modules(model, config)
    if not selected:
        raise ValueError(f"nothing in this {type(model).__name__} would be quantized: skip_modules covers every layer")
    names = _key_names(model, reader)
    keys = {name: key for key, name in names.items()}
    groups = [[n for n, m in selected.items() if m in group] for group in tied_groups(model)]
    weights: dict[str, tuple[str, bool]] = {}
    dropped: set[str] = set()
    for name, module in selected.items():
        key = keys.get(f"{name}.weight")
        group = next((g for g in groups if name in g), [name])
        others = [keys[f"{n}.weight"] for n in group if n != name and f"{n}.weight" in keys]
        if key is None:
            if others:
                continue  # tied: stored under the name of another
            raise ValueError(
                f"{reader.folder} has no tensor for {name}.weight, which {type(model).__name__} needs: the checkpoint "
                "is incomplete, or transformers rebuilds this weight from others while loading; then load it with "
                "from_pretrained(..., quantization_config=KbitConfig(...)) and save_pretrained instead"
            )
        if any(other in weights for other in others):
            dropped.add(key)  # a tied weight that the checkpoint stores twice
            continue
        weights[key] = (name, is_conv1d(module))
    return _Plan(weights, names, dropped, _load_dtype(raw, reader))


def _load_dtype(raw: dict[str, Any], reader: CheckpointReader) -> torch.dtype | None:
    """What from_pretrained(dtype="auto") casts to before it quantizes: config.json's dtype, else the first found."""
    text = raw.get("text_config") or {}
    value = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if value is not None:
        return parse_dtype(value)
    for key in reader.keys():
        tensor = reader.read(key)
        if tensor.is_floating_point():
            return tensor.dtype
    return None


def _key_names(model: Any, reader: CheckpointReader) -> dict[str, str]:
    """Checkpoint keys by the name that the model gives them; keys that it does not know keep their own.

    Files may lack the base model's prefix or carry it, and older ones use other names (transformers knows which).
    """
    known = {*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    rename = _renaming(model)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in reader.keys():
        candidates = (key, rename(key), f"{prefix}{key}", key.removeprefix(prefix))
        name = next((c for c in candidates if c in known), key)
        names[key] = key if name in taken else name
        taken.add(names[key])
    return names


def _renaming(model: Any) -> Callable[[str], str]:
    """How the installed transformers renames the keys of older checkpoints of this architecture."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        import re

        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def rename(key: str) -> str:
            for pattern, replacement in patterns.items():
                key = re.sub(pattern, replacement, key)
            if key.endswith(("LayerNorm.gamma", "LayerNorm.beta")):
                key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            return key

        return rename
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    state = model.state_dict()
    return lambda key: rename_source_key(key, renamings, [], model.base_model_prefix, state)[0]


def _converted(
    key: str, tensor: Tensor, plan: _Plan, config: KbitConfig, layout: str, reader: CheckpointReader
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the result that one tensor of the source becomes."""
    if key not in plan.weights:
        yield plan.names[key], tensor
        return
    module, transposed = plan.weights[key]
    if not tensor.is_floating_point() or tensor.dim() != 2:
        raise ValueError(
            f"{reader.path_of(key)}: {key} is {tensor.dtype} {list(tensor.shape)}, not a floating point matrix; "
            "the model is quantized already, or its config.json belongs to another one"
        )
    if plan.dtype is not None:
        tensor = tensor.to(plan.dtype)
    try:
        q = quantize(tensor.t() if transposed else tensor, config.weight_format, name=key)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{reader.path_of(key)}: {error}") from None
    if layout == "bitsandbytes":
        from kbit.checkpoint import bnb

        yield from bnb.to_tensors(q, module).items()
        return
    for part, value in to_parts(q).items():
        # Without kbit, codes [N, K] would load into a float weight as garbage; this shape stops that with an error.
        yield f"{module}.{part}", value.unsqueeze(-1) if value.dtype == torch.int8 else value


def _skipped(model: nn.Module, plan: _Plan) -> list[str]:
    """Names of the linear layers that stay as they are: bitsandbytes' loader has to be told."""
    quantized = {name for name, _ in plan.weights.values()}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    kept = [n for n in names if n not in quantized]
    # A name also matches what lies below it, and parts of other names, so only exact ones that are safe may be given.
    return [n for n in kept if not any(matches(q, [n]) for q in quantized)]
