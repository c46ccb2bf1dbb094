"""bitsandbytes' layers and functions on their own, without the Hugging Face libraries.

Nothing in here knows kbit:  kbit run examples/dropin/layers.py
"""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# A tensor, quantized and back.
weight = torch.randn(256, 512, device=device)
packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
error = (F.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
print(f"NF4: {packed.nbytes} bytes of {weight.nbytes}, relative error {error:.3f}")

# Layers take the weights of plain ones and quantize when they are moved to a device.
plain = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 64))
x = torch.randn(32, 512, device=device)
for name, make in {
    "LinearNF4": lambda n, k: bnb.nn.LinearNF4(n, k, compute_dtype=torch.float32),
    "Linear8bitLt": lambda n, k: bnb.nn.Linear8bitLt(n, k, has_fp16_weights=False, threshold=6.0),
}.items():
    quantized = torch.nn.Sequential(make(512, 256), make(256, 64))
    quantized.load_state_dict(plain.state_dict())
    quantized = quantized.to(device)
    expected = plain.to(device)(x)
    error = (quantized(x) - expected).norm() / expected.norm()
    reloaded = torch.nn.Sequential(make(512, 256), make(256, 64)).to(device)
    reloaded.load_state_dict(quantized.state_dict())
    assert torch.equal(reloaded(x), quantized(x))
    print(f"{name}: relative error {error:.4f}, state dict of {len(quantized.state_dict())} tensors loads again")
