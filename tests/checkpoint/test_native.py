"""`quantize_checkpoint`: the same bits as quantizing at load time, in bounded memory, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit import KbitConfig
from kbit.checkpoint import quantize_checkpoint
from tests.integrations import tiny_models


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bf16 checkpoints, sharded."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    models = {name: build() for name, build in tiny_models.MODELS.items()}
    models["tied"] = tiny_models.llama(tie_word_embeddings=True)
    return {
        name: tiny_models.save(model, folder / name, torch.bfloat16, max_shard_size="100KB")
        for name, model in models.items()
    }


CASES = [
    *((name, KbitConfig()) for name in tiny_models.MODELS),
    *((name, KbitConfig(bits=8)) for name in ("llama", "gpt2", "t5")),
    ("llama", KbitConfig.from_format("fp4-plain", block_size=128)),
    ("llama", KbitConfig(skip_modules=[])),
    ("llama", KbitConfig(skip_modules=["mlp"])),
    ("tied", KbitConfig()),
    ("tied", KbitConfig(quantize_embeddings=True)),
    ("gpt2", KbitConfig(bits=8, quantize_embeddings=True)),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_loads_like_quantizing_at_load_time(sources, tmp_path: Path, name: str, config: KbitConfig) -> None:
    out = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    summary = quantize_checkpoint(
        sources[name], out, config, max_shard_size=60_000, progress=lambda *args: seen.append(args)
    )
    ours, theirs = tiny_models.load(out), tiny_models.load(sources[name], config)
    tiny_models.assert_same_bits(ours, theirs)
    assert torch.equal(tiny_models.logits(ours), tiny_models.logits(theirs))
    assert ours.config.quantization_config.to_dict() == config.to_dict()
    assert summary.quantized >= 7 and len(summary.files) > 1
    assert seen[-1][0] == seen[-1][1]
    assert all((out / file).is_file() for file in summary.files)
    assert summary.nbytes < summary.source_bytes


def test_the_files_are_those_that_save_pretrained_writes(sources, tmp_path: Path) -> None:
    """Key for key and bit for bit, so that either can be read by whatever reads the other."""
    for config in (KbitConfig(), KbitConfig(bits=8), KbitConfig(quantize_embeddings=True)):
        quantize_checkpoint(sources["tied"], tmp_path / "ours", config, force=True)
        tiny_models.load(sources["tied"], config).save_pretrained(tmp_path / "theirs")
        ours = load_file(tmp_path / "ours" / "model.safetensors")
        theirs = load_file(tmp_path / "theirs" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype and tensor.shape == theirs[key].shape, key
            assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key


def test_keys_without_the_base_models_prefix(sources, tmp_path: Path) -> None:
    """As in the original GPT-2 and BERT checkpoints."""
    for name, prefix in (("gpt2", "transformer."), ("bert", "bert.")):
        folder = tmp_path / name
        folder.mkdir()
        model = tiny_models.load(sources[name])
        state = {key.removeprefix(prefix): tensor.clone() for key, tensor in model.state_dict().items()}
        for tied in ("lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
            state.pop(tied, None)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes((sources[name] / "config.json").read_bytes())
        quantize_checkpoint(folder, tmp_path / f"{name}-out", KbitConfig())
        tiny_models.assert_same_bits(
            tiny_models.load(tmp_path / f"{name}-out"), tiny_models.load(sources[name], KbitConfig())
        )


def test_weights_are_cast_like_from_pretrained_casts_them(tmp_path: Path) -> None:
    """config.json says bfloat16, the file holds fp32: loading would quantize the bf16 values."""
    source = tiny_models.save(tiny_models.llama(), tmp_path / "source", torch.float32)
    raw = json.loads((source / "config.json").read_text())
    raw.pop("dtype", None), raw.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    quantize_checkpoint(source, tmp_path / "out", KbitConfig())
    tiny_models.assert_same_bits(tiny_models.load(tmp_path / "out"), tiny_models.load(source, KbitConfig()))


def test_side_files_are_copied(sources, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sources["llama"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("a card")
    (source / "pytorch_model.bin").write_bytes(b"not ours to copy")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    quantize_checkpoint(source, tmp_path / "out", KbitConfig())
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "additional_chat_templates/tool.jinja",
    }


# ---- errors ----


def damaged(sources, tmp_path: Path) -> Path:
    """A copy to damage, in one file."""
    return tiny_models.save(tiny_models.load(sources["llama"]), tmp_path / "damaged", torch.bfloat16)


def refuse(source: Path, out: Path, message: str, config: KbitConfig | None = None, **kwargs) -> None:
    """ValueError with that message, and nothing at or beside `out`."""
    before = sorted(out.parent.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quantize_checkpoint(source, out, config or KbitConfig(), **kwargs)
    assert sorted(out.parent.iterdir()) == before


def test_nan_names_key_and_file(sources, tmp_path: Path) -> None:
    source = damaged(sources, tmp_path)
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refuse(source, tmp_path / "out", r"model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight'.*NaN at \[7, 3\]")


def test_missing_tensor(sources, tmp_path: Path) -> None:
    source = damaged(sources, tmp_path)
    state = load_file(source / "model.safetensors")
    del state["model.layers.0.self_attn.k_proj.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refuse(source, tmp_path / "out", "has no tensor for model.layers.0.self_attn.k_proj.weight")


def test_truncated_weights(sources, tmp_path: Path) -> None:
    source = damaged(sources, tmp_path)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(source, tmp_path / "out", "model.safetensors is truncated")


def test_not_a_model_folder(sources, tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", tmp_path / "out", "there is no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, tmp_path / "out", "no config.json")
    (empty / "config.json").write_text("{")
    refuse(empty, tmp_path / "out", "not valid JSON")
    (empty / "config.json").write_text("{}")
    refuse(empty, tmp_path / "out", "no model_type")
    (empty / "config.json").write_text((sources["llama"] / "config.json").read_text())
    refuse(empty, tmp_path / "out", "holds no model.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"x")
    refuse(empty, tmp_path / "out", "pickled weights only")


def test_unknown_architecture(sources, tmp_path: Path) -> None:
    source = damaged(sources, tmp_path)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "architectures": ["SomethingForCausalLM"]}))
    refuse(source, tmp_path / "out", "has no SomethingForCausalLM")


def test_quantized_already(sources, tmp_path: Path) -> None:
    quantize_checkpoint(sources["llama"], tmp_path / "first", KbitConfig())
    refuse(tmp_path / "first", tmp_path / "out", "quantized already .kbit.")


def test_nothing_to_quantize_and_bad_layout(sources, tmp_path: Path) -> None:
    refuse(sources["llama"], tmp_path / "out", "nothing in this Llama", KbitConfig(skip_modules=["*"]))
    refuse(sources["llama"], tmp_path / "out", "unknown layout 'gguf'", layout="gguf")


def test_out_is_never_overwritten_by_accident(sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refuse(sources["llama"], out, "exists already")
    refuse(sources["llama"], out, "not a model folder and is not replaced", force=True)
    assert (out / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    refuse(sources["llama"], file, "exists already")
    refuse(sources["llama"], file, "not a folder", force=True)
    for place in (sources["llama"], sources["llama"].parent):
        refuse(sources["llama"], place, "the model that is being read", force=True)
    assert (sources["llama"] / "config.json").is_file()

    out = tmp_path / "model"
    quantize_checkpoint(sources["llama"], out, KbitConfig())
    (out / "left-over.txt").write_text("old")
    refuse(sources["llama"], out, "exists already")
    quantize_checkpoint(sources["llama"], out, KbitConfig(bits=8), force=True)
    assert not (out / "left-over.txt").exists()
    assert tiny_models.load(out).config.quantization_config.bits == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model", "out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(sources, tmp_path: Path, error: type[BaseException]) -> None:
    old = tmp_path / "old"
    quantize_checkpoint(sources["llama"], old, KbitConfig(bits=8))
    before = {p.name: p.read_bytes() for p in old.iterdir()}

    def fail(done: int, total: int) -> None:
        if done == total // 2:
            raise error("half-way")

    for out, force in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(error):
            quantize_checkpoint(sources["llama"], out, KbitConfig(), force=force, max_shard_size=50_000, progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """A checkpoint of 70 MB in tensors of 1.3 MB at most: anonymous memory grows by a few tensors, not by the model.

    In a process of its own; the peak is sampled every millisecond.
    """
    source = tmp_path / "source"
    code = """
import json, sys, threading, time, torch
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from kbit import KbitConfig
from kbit.checkpoint import CheckpointWriter, quantize_checkpoint

def anonymous():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

source, out = Path(sys.argv[1]), sys.argv[2]
source.mkdir()
config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1280, num_hidden_layers=12,
                     num_attention_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16")
config.save_pretrained(source)
with torch.device("meta"):
    shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
with CheckpointWriter(source, 10**8) as writer:
    for key, shape in shapes.items():
        writer.add(key, torch.randn(shape, dtype=torch.bfloat16))
    writer.finish()
total = writer.nbytes
peak = start = 0
running = True

def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def watch(done, count):
    global start, peak
    if done == 1:  # torch's and transformers' own memory is there by now
        start = peak = anonymous()

thread = threading.Thread(target=sample)
thread.start()
summary = quantize_checkpoint(source, out, KbitConfig(), progress=watch)
running = False
thread.join()
print(json.dumps({"total": total, "grown": peak - start, "out": summary.nbytes}))
"""
    result = tiny_models.run_python(code, str(source), str(tmp_path / "out"), str(tiny_models.ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers["total"] > 65e6
    # Quantizing works in chunks of 2^18 elements; allocators keep some of what they had.
    assert numbers["grown"] < 20e6, numbers
    assert numbers["out"] < 0.3 * numbers["total"]
