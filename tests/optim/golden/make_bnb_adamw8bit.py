"""How bnb_adamw8bit.pt was made: `python tests/optim/golden/make_bnb_adamw8bit.py` with bitsandbytes 0.50.2 on a CPU.

Three AdamW8bit steps on a parameter of 5,000 elements and one of 10 (32-bit states), and what the states decode to.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch

if __name__ == "__main__":
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(50, 100)), torch.nn.Parameter(torch.randn(10))]
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    state, decoded = optimizer.state[params[0]], {}
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        values = state[f"qmap{number}"][state[f"state{number}"].long()].view(-1)
        decoded[name] = (values * state[f"absmax{number}"].repeat_interleave(256)[:5000]).view(50, 100)
    out = {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params], "decoded": decoded}
    torch.save(out, Path(__file__).with_name("bnb_adamw8bit.pt"))
