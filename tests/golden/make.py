"""Write the golden files of this folder from a real bitsandbytes 0.50.2 on an x86 CPU: `python tests/golden/make.py`.

The tests compare kbit with the committed files on every machine, and with a live bitsandbytes where it is installed;
`inputs()` serves both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def inputs() -> dict[str, Tensor]:
    """Tensors that reach every corner of the 4-bit formats, always the same ones."""
    rng = torch.Generator().manual_seed(20260920)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    def ties() -> Tensor:
        """Values that lie exactly on, just below and just above the midpoints between neighbouring code values."""
        from kbit.formats.codebooks import codebook

        rows = []
        for name in ("nf4", "fp4"):
            middle = codebook(name, "cpu", "midpoints")
            for value in (middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)):
                rows.append(torch.cat([torch.ones(1), value, -value, torch.zeros(1)]))  # absmax 1: nothing is scaled
        return torch.stack(rows).reshape(-1)

    zeros = normal(5, 64)
    zeros[1], zeros[4] = 0.0, 0.0
    signed_zeros = torch.where(normal(2, 64) > 0, 0.0, -0.0)
    signed_zeros[0, 0] = 1.0
    wide = normal(8, 64) * 10.0 ** torch.randint(-12, 12, (8, 64), generator=rng)
    return {
        "fp32": normal(16, 256),
        "fp16": normal(16, 128).half(),
        "bf16": normal(16, 128).bfloat16(),
        "odd": normal(7, 33),
        "odd-bf16": normal(9, 37).bfloat16(),
        "rows-shorter-than-blocks": normal(9, 40).half(),
        "cube": normal(3, 5, 67),
        "one": torch.tensor([-0.3]),
        "empty": torch.empty(0, 64),
        "short-zero-block": torch.cat([normal(64), torch.zeros(10)]),
        "zero-blocks": zeros,
        "signed-zeros": signed_zeros,
        "wide": wide,
        "tiny": normal(4, 64) * 1e-37,
        "denormal": normal(4, 64) * 1e-40,
        "ties": ties(),
    }


def int8_inputs() -> dict[str, Tensor]:
    """fp16, as bitsandbytes quantizes int8 weights from nothing else."""
    rng = torch.Generator().manual_seed(8)
    x = torch.randn(16, 72, generator=rng)
    halves = (torch.arange(-127, 128) / 2.0).repeat(2, 1)  # codes that end in exactly one half
    halves[:, 0] = 127.0
    zero_row = torch.randn(4, 33, generator=rng)
    zero_row[2] = 0.0
    return {name: t.half() for name, t in {"normal": x, "halves": halves, "zero-row": zero_row}.items()}


def scale_inputs() -> dict[str, Tensor]:
    """Block scales as double quantization meets them: fp32, positive."""
    rng = torch.Generator().manual_seed(9)
    return {
        "normal": torch.randn(700, generator=rng).abs() * 0.05 + 0.1,
        "wide": 10.0 ** (torch.rand(300, generator=rng) * 12 - 8),
        "equal": torch.full((40,), 0.125),
    }


def state_inputs() -> dict[str, Tensor]:
    """Optimizer states for the dynamic maps: heavy tails, zeros, both signs."""
    rng = torch.Generator().manual_seed(10)
    x = torch.randn(3, 300, generator=rng) * 10.0 ** (torch.rand(3, 300, generator=rng) * 8 - 8)
    x[0, :50] = 0.0
    return {"signed": x, "unsigned": x.square()}


def main() -> None:
    import bitsandbytes
    import bitsandbytes.functional as F
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    four: dict[str, Tensor] = {}
    for name, x in inputs().items():
        four[f"{name}/x"] = x
        for quant_type in ("nf4", "fp4"):
            for block_size in BLOCK_SIZES if name in ("fp32", "odd") else (64,):
                packed, state = F.quantize_4bit(x, blocksize=block_size, quant_type=quant_type)
                key = f"{name}/{quant_type}/{block_size}"
                four[f"{key}/codes"] = packed.view(-1)
                four[f"{key}/absmax"] = state.absmax
                if block_size == 64 and x.shape[-1] >= 64 and name != "fp32":
                    four[f"{key}/values"] = F.dequantize_4bit(packed, state).reshape(x.shape)

    other: dict[str, Tensor] = {
        "map/nf4": F.get_4bit_type("nf4", "cpu"),
        "map/fp4": F.get_4bit_type("fp4", "cpu"),
        "map/dynamic8": F.create_dynamic_map(True),
        "map/dynamic8-unsigned": F.create_dynamic_map(False),
    }
    for name, x in int8_inputs().items():
        other[f"int8/{name}/x"] = x
        codes, absmax, _ = F.int8_vectorwise_quant(x)
        other[f"int8/{name}/codes"], other[f"int8/{name}/absmax"] = codes, absmax
        other[f"int8/{name}/values"] = F.int8_vectorwise_dequant(codes, absmax)
    for name, absmax in scale_inputs().items():
        offset = absmax.mean()
        codes, state = F.quantize_blockwise(absmax - offset, blocksize=256)
        key = f"double/{name}"
        other[f"{key}/x"], other[f"{key}/codes"] = absmax, codes
        other[f"{key}/nested_absmax"], other[f"{key}/nested_offset"] = state.absmax, offset.view(1)
        other[f"{key}/values"] = F.dequantize_blockwise(codes, state) + offset
    for name, x in state_inputs().items():
        codes, state = F.quantize_blockwise(x, code=other["map/dynamic8" + "-unsigned" * (name == "unsigned")])
        key = f"dynamic/{name}"
        other[f"{key}/x"], other[f"{key}/codes"], other[f"{key}/absmax"] = x, codes, state.absmax
        other[f"{key}/values"] = F.dequantize_blockwise(codes, state)

    metadata = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__.split("+")[0]}
    for name, tensors in (("four_bit", four), ("eight_bit", other)):
        save_file({key: t.contiguous() for key, t in tensors.items()}, FOLDER / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(FOLDER.parents[1]))
    main()
