"""8-bit optimizer states in a plain training loop, with one embedding kept in 32 bits.

Nothing in here knows kbit:  kbit run examples/dropin/optimizer.py
"""

import bitsandbytes as bnb
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(
    bnb.nn.StableEmbedding(256, 64), torch.nn.Flatten(), torch.nn.Linear(64 * 8, 256), torch.nn.Linear(256, 256)
).to(device)
optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
bnb.optim.GlobalOptimManager.get_instance().override_config(model[3].weight, "optim_bits", 32)

x = torch.randint(0, 256, (64, 8), device=device)
y = x[:, 0]
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]

sizes = {tensor.dtype: 0 for state in optimizer.state.values() for tensor in state.values()}
for state in optimizer.state.values():
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.nbytes
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; bytes of state by dtype: {sizes}")
