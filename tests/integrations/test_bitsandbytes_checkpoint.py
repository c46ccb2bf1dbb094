"""Checkpoints both ways: the drop-in writes bitsandbytes' bytes, both read both, and damage is a clear error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kbit.checkpoint import bnb
from kbit.config import KbitConfig
from kbit.formats.spec import Format
from kbit.nn import Linear4bit, Linear8bit
from kbit.nn.base import to_parts
from kbit.ops import quantize
from tests.integrations.dropin.harness import run_file, save_llama

SCRIPT = Path(__file__).parent / "dropin" / "checkpoints.py"
# What the script writes; it imports bitsandbytes, which not every environment of these tests has.
KINDS = ("nf4", "fp4", "nf4-double", "nf4-bf16", "int8")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours/KIND and theirs/KIND: the same model, saved by the drop-in and by bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("checkpoints")
    model = save_llama(folder / "model")
    for name, shim in (("ours", True), ("theirs", False)):
        output = json.loads(run_file(SCRIPT, "write", model, folder / name, shim=shim).splitlines()[-1])
        assert output["version"].endswith("+kbit") == shim
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4-double"])
def test_files_are_equal_byte_for_byte(written: Path, kind: str) -> None:
    for name in ("model.safetensors", "config.json"):
        assert (written / "ours" / kind / name).read_bytes() == (written / "theirs" / kind / name).read_bytes(), name


def test_double_quantized_files_differ_in_the_codes_of_scales_alone(written: Path) -> None:
    """bitsandbytes' CPU quantizer does not take the nearest value of the dynamic map; ours does, so it is closer."""
    folder = written / "ours" / "nf4-double"
    assert (folder / "config.json").read_bytes() == (written / "theirs" / "nf4-double" / "config.json").read_bytes()
    ours, theirs = (load_file(written / who / "nf4-double" / "model.safetensors") for who in ("ours", "theirs"))
    plain = load_file(written / "ours" / "nf4" / "model.safetensors")
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if not key.endswith("weight.absmax"):
            assert torch.equal(ours[key], value), key
            continue
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape
        module = key.removesuffix(".weight.absmax")
        errors = []
        for tensors in (ours, theirs):
            q = bnb.from_tensors(tensors, module)
            scales = torch.ops.kbit.dequantize_absmax(q.absmax.view(-1), q.nested_absmax, q.nested_offset)
            errors.append((scales - plain[key]).abs())
        assert (errors[0] <= errors[1] + 1e-8).all()


def test_everybody_reads_what_everybody_wrote(written: Path) -> None:
    """The drop-in, bitsandbytes and the native reader decode every file to the same bits."""
    folders = [str(written / who / kind) for who in ("ours", "theirs") for kind in KINDS]
    ours, theirs = (
        json.loads(run_file(SCRIPT, "read", *folders, shim=shim).splitlines()[-1]) for shim in (True, False)
    )
    for folder in folders:
        assert ours[folder] and ours[folder] == theirs[folder], folder
        tensors = load_file(Path(folder) / "model.safetensors")
        for module, expected in ours[folder].items():
            q = bnb.from_tensors(tensors, module)
            w = q.dequantize(torch.float32 if q.format.name == "int8" else None)
            assert hashlib.sha256(w.view(torch.uint8).numpy().tobytes()).hexdigest() == expected, (folder, module)
        config = bnb.kbit_config(json.loads((Path(folder) / "config.json").read_text())["quantization_config"])
        assert config.weight_format == q.format


# ---- without transformers: layout, native modules, damage ----

FORMATS = {"nf4": Format("nf4", 64, True), "plain": Format("fp4", 128, False), "int8": Format("int8", 0)}


def checkpoint(fmt: Format, shape: tuple[int, ...] = (32, 640), dtype: torch.dtype = torch.bfloat16) -> dict:
    return bnb.to_tensors(quantize(torch.randn(shape).to(dtype), fmt), "a.q_proj")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(32, 640), (5, 100)])
def test_a_checkpoint_loads_into_native_modules(fmt: Format, shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape).bfloat16(), fmt)
    again = bnb.from_tensors(bnb.to_tensors(q, "a.q_proj"), "a.q_proj", dtype=torch.bfloat16)
    assert again.format == fmt and again.dtype == torch.bfloat16 and torch.equal(again.dequantize(), q.dequantize())
    options = {"format": fmt} if fmt.is_4bit else {}
    layer = (Linear4bit if fmt.is_4bit else Linear8bit)(shape[1], shape[0], bias=False, dtype=torch.bfloat16, **options)
    layer.set_parts(to_parts(again))
    assert torch.equal(layer.dequantize(), q.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_in_any_storage_dtype(storage: torch.dtype) -> None:
    tensors = checkpoint(FORMATS["nf4"])
    expected = bnb.from_tensors(tensors, "a.q_proj").dequantize()
    tensors["a.q_proj.weight"] = tensors["a.q_proj.weight"].view(-1).view(storage).view(-1, 1)
    assert torch.equal(bnb.from_tensors(tensors, "a.q_proj").dequantize(), expected)


def test_an_offset_kept_as_a_tensor_is_read_as_what_it_is() -> None:
    tensors = checkpoint(FORMATS["nf4"])
    key = "a.q_proj.weight.quant_state.bitsandbytes__nf4"
    values = bnb.unpack_json(tensors[key])
    offset = torch.tensor(values.pop("nested_offset")).bfloat16()
    tensors |= {key: bnb.pack_json(values), "a.q_proj.weight.nested_offset": offset}
    assert torch.equal(bnb.from_tensors(tensors, "a.q_proj").nested_offset, offset.float().view(1))


def test_group_keys_finds_quantized_weights_of_every_kind() -> None:
    keys = [*checkpoint(FORMATS["nf4"]), *(f"{k}".replace("a.", "experts.0.") for k in checkpoint(FORMATS["plain"]))]
    keys += [k.replace("q_proj", "k_proj") for k in checkpoint(FORMATS["int8"])] + ["a.q_proj.bias", "norm.weight"]
    groups = bnb.group_keys(keys)
    assert set(groups) == {"a.q_proj.weight", "experts.0.q_proj.weight", "a.k_proj.weight"}
    assert set(groups["a.k_proj.weight"]) == {"weight", "SCB", "weight_format"}
    assert groups["a.q_proj.weight"]["absmax"] == "a.q_proj.weight.absmax"


def test_a_weight_that_is_not_quantized_is_said_to_be() -> None:
    with pytest.raises(ValueError, match=r"a\.q_proj\.weight is not quantized"):
        bnb.from_tensors({"a.q_proj.weight": torch.randn(4, 4), "a.q_proj.bias": torch.randn(4)}, "a.q_proj")


BLOB = "a.q_proj.weight.quant_state.bitsandbytes__nf4"
W = "a.q_proj.weight"


def edited(**changes: object):  # type: ignore[no-untyped-def]
    def change(t: dict) -> None:
        values = bnb.unpack_json(t[BLOB])
        values.update(changes)
        t[BLOB] = bnb.pack_json({k: v for k, v in values.items() if v is not None})

    return change


DAMAGE = {
    "no weight": (lambda t: t.pop(W), f"{W} is missing"),
    "no absmax": (lambda t: t.pop(f"{W}.absmax"), f"lacks {W}.absmax"),
    "no nested map": (lambda t: t.pop(f"{W}.nested_quant_map"), f"lacks {W}.nested_quant_map"),
    "no blob": (lambda t: t.pop(BLOB), "exactly one"),
    "two blobs": (lambda t: t.update({BLOB[:-3] + "fp4": t[BLOB]}), "exactly one"),
    "blob of the other type": (lambda t: t.update({BLOB[:-3] + "fp4": t.pop(BLOB)}), "says that the weight is nf4"),
    "truncated blob": (lambda t: t.update({BLOB: t[BLOB][:-20]}), "is not JSON"),
    "empty blob": (lambda t: t.update({BLOB: t[BLOB][:0]}), "is not JSON"),
    "blob of bytes that are no text": (lambda t: t.update({BLOB: t[BLOB] | 0x80}), "is not JSON"),
    "blob that is a list": (lambda t: t.update({BLOB: torch.tensor(list(b"[1]"), dtype=torch.uint8)}), "JSON list"),
    "blob in floats": (lambda t: t.update({BLOB: t[BLOB].float()}), "flat uint8"),
    "huge blob": (lambda t: t.update({BLOB: torch.zeros(10**6, dtype=torch.uint8)}), "flat uint8"),
    "no shape": (edited(shape=None), "lacks shape"),
    "unknown field": (edited(extra=1), "unknown fields extra"),
    "another shape": (edited(shape=[32, 641]), "take 10256 bytes"),
    "negative shape": (edited(shape=[-32, -640]), "list of sizes"),
    "shape of text": (edited(shape=["32", "640"]), "list of sizes"),
    "huge shape": (edited(shape=[10**12, 10**12]), "the checkpoint is damaged"),
    "block size 0": (edited(blocksize=0), "blocksize must be"),
    "another block size": (edited(blocksize=128), "absmax"),
    "block size of text": (edited(blocksize="64"), "blocksize must be"),
    "unknown dtype": (edited(dtype="int8"), "dtype must be"),
    "dtype that is a list": (edited(dtype=["float32"]), "dtype must be"),
    "unknown type": (edited(quant_type="nf3"), "quant_type must be"),
    "infinite offset": (edited(nested_offset=float("inf")), "finite number"),
    "offset that is NaN": (edited(nested_offset=float("nan")), "finite number"),
    "offset of text": (edited(nested_offset="0.1"), "finite number"),
    "nested block size": (edited(nested_blocksize=64), "nested_blocksize must be 256"),
    "too few codes": (lambda t: t.update({W: t[W][:-1]}), "take 10240 bytes"),
    "int32 codes": (lambda t: t.update({W: t[W].view(-1).view(torch.int32)}), "torch.int32"),
    "too few scales": (lambda t: t.update({f"{W}.absmax": t[f"{W}.absmax"][:-1]}), r"absmax is torch.uint8 \[319\]"),
    "scales in floats": (lambda t: t.update({f"{W}.absmax": t[f"{W}.absmax"].float()}), "uint8 codes"),
    "NaN in nested scales": (
        lambda t: t[f"{W}.nested_absmax"].fill_(float("nan")),
        "nested_absmax holds values that are not finite",
    ),
    "another codebook": (lambda t: t[f"{W}.quant_map"].mul_(0.9), "not the nf4 codebook"),
    "another nested map": (lambda t: t[f"{W}.nested_quant_map"].mul_(0.9), "not the signed dynamic map"),
    "8-bit parts too": (lambda t: t.update({"a.q_proj.SCB": torch.ones(32)}), "both 8-bit and 4-bit"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_4bit_checkpoint_is_an_error_that_names_it(change, words: str) -> None:  # type: ignore[no-untyped-def]
    tensors = checkpoint(FORMATS["nf4"])
    assert bnb.from_tensors(tensors, "a.q_proj").shape == (32, 640)
    change(tensors)
    with pytest.raises(ValueError, match=words):
        bnb.from_tensors(tensors, "a.q_proj")


DAMAGE_8BIT = {
    "no scales": (lambda t: t.pop("a.q_proj.SCB"), r"a\.q_proj\.SCB, the row scales"),
    "old layout": (lambda t: t.update({"a.q_proj.weight_format": torch.tensor(3)}), "col_ampere"),
    "float codes": (lambda t: t.update({W: t[W].float()}), "torch.float32"),
    "too few scales": (lambda t: t.update({"a.q_proj.SCB": torch.ones(3)}), "expected 32"),
    "infinite scales": (lambda t: t["a.q_proj.SCB"].fill_(float("inf")), "not finite"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE_8BIT.values(), ids=DAMAGE_8BIT)
def test_a_damaged_8bit_checkpoint_is_an_error_that_names_it(change, words: str) -> None:  # type: ignore[no-untyped-def]
    tensors = checkpoint(FORMATS["int8"])
    change(tensors)
    with pytest.raises(ValueError, match=words):
        bnb.from_tensors(tensors, "a.q_proj")


def test_8bit_without_weight_format_is_row_major() -> None:
    tensors = checkpoint(FORMATS["int8"])
    del tensors["a.q_proj.weight_format"]
    assert bnb.from_tensors(tensors, "a.q_proj").format.name == "int8"


def test_random_bytes_in_the_blob_never_get_through() -> None:
    generator = torch.Generator().manual_seed(0)
    good = checkpoint(FORMATS["nf4"])
    expected = bnb.from_tensors(good, "a.q_proj").dequantize()
    for _ in range(300):
        tensors = dict(good)
        blob = tensors[BLOB].clone()
        at = int(torch.randint(0, blob.numel(), (1,), generator=generator))
        blob[at] = int(torch.randint(0, 256, (1,), generator=generator))
        tensors[BLOB] = blob
        try:
            q = bnb.from_tensors(tensors, "a.q_proj")
        except ValueError as error:
            assert "a.q_proj" in str(error)
            continue
        # Only a digit of the offset or a letter of the dtype can be another valid one.
        assert q.shape == expected.shape and q.dequantize().isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        KbitConfig(bits=4, double_quant=False, skip_modules=["lm_head"]),
        KbitConfig(bits=4, format="fp4", compute_dtype=torch.float16),
        KbitConfig(bits=8, outlier_threshold=4.0),
    ],
)
def test_config_round_trip(config: KbitConfig) -> None:
    again = bnb.kbit_config(json.loads(json.dumps(bnb.config_dict(config, config.skip_modules))))
    assert again.weight_format == config.weight_format and again.skip_modules == config.skip_modules
    assert again.bits == config.bits and again.outlier_threshold == config.outlier_threshold


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({}, "exactly one"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exactly one"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "nothing quantized"),
    ],
)
def test_configs_that_load_nothing(data: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bnb.kbit_config(data)
