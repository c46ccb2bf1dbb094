"""The peak of memory while a model is quantized on its way in: quantized model + largest weight + 10%.

Measured as the growth of anonymous memory (RssAnon): pages of the mapped checkpoint belong to the file and can be
dropped at any time. Each case runs in its own process, where a tiny model was loaded before, so that what libraries
allocate once is not counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import tiny_models as tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")

MEASURE = """
import json, re, sys, threading, time
import torch
torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost more than they bring
import kbit, transformers
path, warm, config, dtype, extra = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:6])

def anonymous():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read()).group(1)) * 1024

def load(path):
    settings = kbit.KbitConfig(**config) if config else None
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), **({"quantization_config": settings} if settings else {}), **extra)

load(warm)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load(path)
done.set()
watcher.join()
after = anonymous()
quantized = [m for m in model.modules() if hasattr(m, "weight_format")]
print(json.dumps({
    "peak": peak - before, "after": after - before, "model": kbit.model_memory(model) if quantized else 0,
    "footprint": model.get_memory_footprint(), "layers": len(quantized),
}))
"""


def write(model_on_meta: Any, folder: Path, dtype: torch.dtype) -> int:
    """A sharded checkpoint of the shapes of a model, filled from one random tensor; the bytes of its largest weight."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    model_on_meta.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model_on_meta).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(p.shape) for name, p in model_on_meta.named_parameters()}
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    noise = torch.randn(largest).mul_(0.02).to(dtype)
    names, index = sorted(shapes), {}
    for number, start in enumerate(range(0, len(names), 40)):
        shard = f"model-{number:05d}.safetensors"
        part = {n: noise[: torch.Size(shapes[n]).numel()].view(shapes[n]).clone() for n in names[start : start + 40]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


def llama(layers: int) -> Any:
    with torch.device("meta"):
        return tiny.llama(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=8, vocab_size=2048
        )


def gpt2(layers: int) -> Any:
    with torch.device("meta"):
        return tiny.gpt2(n_embd=1024, n_layer=layers, n_head=8, vocab_size=2048)


CASES = {
    "llama, int8": (llama, torch.bfloat16, dict(bits=8), "bfloat16", {}),
    "llama, nf4, cast from fp32": (llama, torch.float32, dict(bits=4, double_quant=False), "bfloat16", {}),
    "gpt2, nf4, device_map": (gpt2, torch.bfloat16, dict(bits=4), "bfloat16", {"device_map": "auto"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_peak_of_anonymous_memory(case: str, tmp_path: Path) -> None:
    build, stored, config, dtype, extra = CASES[case]
    largest = write(build(8 if stored == torch.bfloat16 else 5), tmp_path / "large", stored) * 2  # bytes once in bf16
    write(build(1), tmp_path / "warm", stored)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    arguments = [json.dumps(value) for value in (config, dtype, extra)]
    done = tiny.run_python(MEASURE, str(tmp_path / "large"), str(tmp_path / "warm"), *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    limit = 1.1 * (found["footprint"] + largest)
    print(f"\n{case}: checkpoint {size / 2**20:.1f} MiB, {json.dumps(found)}, largest {largest}, limit {limit:.0f}")
    assert size > 180 * 2**20 and found["layers"] > 30
    assert found["peak"] > 0.5 * found["footprint"]  # the measurement sees the weights
    assert found["peak"] <= limit
    assert found["after"] <= 1.05 * found["footprint"]


@pytest.mark.parametrize("name", ["nf4", "nf4-plain", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(50, 64), (37, 33), (129, 200), (64, 1), (3, 4096), (1, 7), (300, 65)])
def test_pieces_give_the_bits_of_the_whole(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from kbit.formats import Format
    from kbit.integrations.transformers import pieces
    from kbit.nn.base import quantize_weight

    monkeypatch.setattr(pieces, "PIECE", 300)
    for dtype in (torch.bfloat16, torch.float32):
        for block_size in (32, 64, 256, 4096) if name != "int8" else (None,):
            fmt = Format.parse(name, block_size)
            for weight in (torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).t()):
                whole = quantize_weight(weight, fmt)
                parts = pieces.quantize_in_pieces(weight, fmt, "w")
                assert whole.keys() == parts.keys()
                for key, part in parts.items():
                    assert part.dtype == whole[key].dtype and part.shape == whole[key].shape
                    assert torch.equal(part, whole[key]), (fmt, key)
    weight[-1, -1] = float("inf")
    with pytest.raises(ValueError, match=rf"'w' holds 1 .*\[{shape[0] - 1}, {shape[1] - 1}\]"):
        pieces.quantize_in_pieces(weight, fmt, "w")
