"""accelerate with quantized layers: dispatch and offload of models quantized in memory, checkpoints, Accelerator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kbit
from kbit.nn.base import QuantizedModule
from tests.integrations import tiny_models as tiny
from tests.integrations.dropin.harness import llama, run_file, save_llama

accelerate = pytest.importorskip("accelerate", reason="the hf extra is not installed")
tf = pytest.importorskip("transformers", reason="the hf extra is not installed")

pytestmark = pytest.mark.transformers
CONFIGS = {"nf4": {"bits": 4}, "fp4-plain": {"bits": 4, "format": "fp4", "double_quant": False}, "int8": {"bits": 8}}
DROP_IN = Path(__file__).parent / "dropin_accelerate.py"


def model(name: str = "nf4", **options: Any) -> Any:
    """A Llama that was quantized in memory; an intermediate size of 200 gives flat codes in down_proj."""
    built = llama(intermediate_size=200).eval()
    return kbit.quantize_model(built, kbit.KbitConfig(**CONFIGS[name], **options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


def parts_of(module: nn.Module) -> dict[str, torch.Tensor]:
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, QuantizedModule)]
    return {f"{n}.{part}": t for n, m in layers for part, t in m.parts().items()}


def split(disk: str, cpu: str = "cpu") -> dict[str, str]:
    """The second layer and the head elsewhere."""
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    return {**dict.fromkeys(here, cpu), "model.layers.1": disk, "lm_head": disk}


def bring_back(model: Any, expected: dict[str, torch.Tensor]) -> None:
    """Remove accelerate's hooks, which puts offloaded tensors back, and compare every bit."""
    accelerate.hooks.remove_hook_from_submodules(model)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert not state[key].is_meta, key
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offload_of_a_model_quantized_in_memory_and_back(
    where: str, name: str, embeddings: bool, tmp_path: Path
) -> None:
    m = model(name, quantize_embeddings=embeddings)
    before, expected = copy.deepcopy(m.state_dict()), logits(m)
    if where == "cpu_offload":
        accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    elif where == "disk_offload":
        accelerate.disk_offload(m, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(m, split("disk"), main_device="cpu", offload_dir=str(tmp_path))
    away = parts_of(m if where != "dispatch_model" else m.model.layers[1])
    assert len(away) >= 14 and all(part.is_meta for part in away.values())
    for _ in range(2):
        assert torch.equal(logits(m), expected)
    assert all(part.is_meta for part in parts_of(m.model.layers[1]).values())
    if where == "disk_offload":
        assert any(tmp_path.iterdir())

    # Saved from there it is the same checkpoint.
    m.save_pretrained(tmp_path / "q")
    state = tiny.load(tmp_path / "q").state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)

    bring_back(m, before)
    assert torch.equal(logits(m), expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_offload_of_adapters_on_quantized_layers(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    m = peft.get_peft_model(
        model(name), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    before, expected = copy.deepcopy(m.state_dict()), logits(m)
    accelerate.disk_offload(m, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(logits(m), expected)
    bring_back(m, before)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_device_maps_are_made_from_stored_sizes(name: str) -> None:
    m = model(name)
    total = int(kbit.model_memory(m))
    sizes = accelerate.utils.compute_module_sizes(m)
    assert sizes[""] == total
    # In memory that just holds the quantized model, all of it stays, and part of the floating point one goes.
    memory = {"cpu": total + sizes["lm_head"]}
    whole = {"no_split_module_classes": ["LlamaDecoderLayer"]}
    assert set(accelerate.infer_auto_device_map(m, memory, **whole).values()) == {"cpu"}
    plain = kbit.dequantize_model(copy.deepcopy(m))
    assert "disk" in accelerate.infer_auto_device_map(plain, memory, **whole).values()
    # And with room for one layer less, one layer goes.
    found = accelerate.infer_auto_device_map(m, {"cpu": total - 1}, **whole)
    assert "disk" in found.values() and "cpu" in found.values()


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_tied_table_on_disk_counts_once(embeddings: bool, tmp_path: Path) -> None:
    """accelerate puts a placeholder of its own under each name after a forward pass."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=200, tie_word_embeddings=True, **sizes)).bfloat16()
    m = kbit.quantize_model(tied, kbit.KbitConfig(bits=4, quantize_embeddings=embeddings))
    before = kbit.model_memory(m)
    accelerate.disk_offload(m, str(tmp_path), execution_device=torch.device("cpu"))
    m(torch.arange(8)[None])
    assert m.lm_head.weight is not m.model.embed_tokens.weight and m.lm_head.weight.is_meta
    after = kbit.model_memory(m)
    assert (after.quantized, after.other, after.buffers) == (before.quantized, before.other, before.buffers)
    untied = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=200, tie_word_embeddings=False, **sizes)).bfloat16()
    kbit.quantize_model(untied, kbit.KbitConfig(bits=4, quantize_embeddings=embeddings))
    table = untied.lm_head.weight.nbytes
    assert int(kbit.model_memory(untied)) >= int(before) + table
    size = kbit.model_memory(untied)
    accelerate.disk_offload(untied, str(tmp_path / "untied"), execution_device=torch.device("cpu"))
    assert kbit.model_memory(untied) == size


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_gpus(name: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    m = model(name)
    expected = logits(copy.deepcopy(m).to("cuda:0")).cpu()
    m.save_pretrained(tmp_path / "q")
    where: dict[str, Any] = {key: 0 if value == "cpu" else 1 for key, value in split("disk").items()}
    dispatched = accelerate.dispatch_model(m, where)
    loaded = tiny.load(tmp_path / "q", device_map=where)
    for placed in (dispatched, loaded):
        assert {part.device.index for part in parts_of(placed.model.layers[1]).values()} == {1}
        assert torch.equal(logits(placed).cpu(), expected)


# ---- checkpoints through accelerate ----


class Net(nn.Module):
    """No transformers model: what people dispatch with accelerate alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.layers = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96))
        self.out = nn.Linear(96, 10, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.embed(ids)))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("where", [{"": "cpu"}, {"embed": "cpu", "layers": "disk", "out": "cpu"}])
def test_save_model_and_load_checkpoint_and_dispatch(name: str, where: dict[str, str], tmp_path: Path) -> None:
    config = kbit.KbitConfig(**CONFIGS[name], quantize_embeddings=True)
    net = kbit.quantize_model(Net(), config).eval()
    ids = torch.arange(12)[None]
    accelerate.Accelerator(cpu=True).save_model(net, str(tmp_path / "q"))
    empty = kbit.quantize_model(Net(), config).eval()  # other random weights: all must come from the file
    empty = empty.to("meta")
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "q"), device_map=where, offload_folder=str(tmp_path / "offload")
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids), net(ids))
    # What accelerate reads back from wherever it put the weights is what was saved, to the bit.
    state = accelerate.utils.modeling.get_state_dict_offloaded_model(loaded)
    for key, tensor in net.state_dict().items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key


# ---- Accelerator ----


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_accelerator_trains_adapters_and_resumes(name: str, precision: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from accelerate.state import AcceleratorState, PartialState

    def start(seed: int) -> tuple[Any, Any, Any, Any]:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        base = kbit.prepare_for_training(
            kbit.quantize_model(llama(initializer_range=0.1).float(), kbit.KbitConfig(**CONFIGS[name]))
        )
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(3))
        loader = torch.utils.data.DataLoader(ids, batch_size=4)
        return accelerator, *accelerator.prepare(adapted, optimizer, loader)

    def train(accelerator: Any, m: Any, optimizer: Any, loader: Any, epochs: int) -> list[float]:
        m.train()
        losses = []
        for _ in range(epochs):
            for ids in loader:
                with accelerator.accumulate(m):
                    loss = m(input_ids=ids, labels=ids).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    accelerator, m, optimizer, loader = start(0)
    codes = copy.deepcopy(parts_of(accelerator.unwrap_model(m)))
    losses = train(accelerator, m, optimizer, loader, 4)
    accelerator.save_state(str(tmp_path / "state"))
    losses += train(accelerator, m, optimizer, loader, 2)
    assert losses[-1] < losses[0] - 0.3
    after = parts_of(accelerator.unwrap_model(m))
    assert all(torch.equal(after[key], codes[key]) for key in codes)

    accelerator, m, optimizer, loader = start(1)
    accelerator.load_state(str(tmp_path / "state"))
    assert train(accelerator, m, optimizer, loader, 2) == losses[-4:]


# ---- the drop-in ----


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def test_through_the_drop_in(path: Path, tmp_path: Path) -> None:
    """`load_and_quantize_model` and offload of bitsandbytes' layers, with kbit as bitsandbytes."""
    output = run_file(DROP_IN, path, tmp_path)
    assert output.split()[-1] == "done"
