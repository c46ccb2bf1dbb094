"""Train the demo model: a small Llama on the token ids of tokenizer.py, within a given number of minutes.

    python train.py --ids FILE.u16.xz --tokenizer FOLDER --heldout heldout.txt --out FOLDER --minutes 2.45

Method: windows of 512 tokens from packed documents, reshuffled with a new offset each epoch; bf16 autocast over
fp32 weights; Muon for the matrices of the blocks, AdamW for the shared embedding and the norms; warm-up, a constant
rate, then a linear fall to zero. The rate follows the clock, so that the schedule ends inside the time given.
Weights are rounded to bf16 once, at the end, and evaluated as rounded. Each step sees the matrices of the blocks
with fresh Gaussian noise, a share `--noise` of each matrix's size (Graves 2011): with many epochs it holds back
overfitting, and it favours weights that bear rounding. No quantization format takes part in training.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import math
import time
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

START = time.monotonic()
SEED = 20261120
CONTEXT = 512
SHAPE = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4)
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


class Muon:
    """Momentum, then the nearest orthogonal matrix (Newton-Schulz; Jordan et al. 2024), in AdamW's size (Moonlight).

    Matrices of one shape are stacked and stepped together.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float, momentum: float = 0.95):
        shapes: dict[torch.Size, list[Tensor]] = {}
        for m in matrices:
            shapes.setdefault(m.shape, []).append(m)
        self.groups = [(ms, torch.zeros(len(ms), *s, device=ms[0].device)) for s, ms in shapes.items()]
        self.weight_decay, self.momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for matrices, buffer in self.groups:
            grad = torch.stack([m.grad for m in matrices])  # [n, out, in]
            buffer.lerp_(grad, 1 - self.momentum)
            update = self.orthogonal(grad.lerp(buffer, self.momentum))
            update *= -lr * 0.2 * math.sqrt(max(grad.shape[1:]))
            torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)
            torch._foreach_add_(matrices, list(update.to(grad.dtype).unbind(0)))

    @staticmethod
    def orthogonal(g: Tensor) -> Tensor:  # [n, out, in]
        x = g.bfloat16()
        if x.shape[1] > x.shape[2]:
            x = x.mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if g.shape[1] > g.shape[2] else x).float()


def rate(done: float, step: int, hold: float = 0.4) -> float:
    """Share of the peak rate when a share `done` of the time is over."""
    return min(1.0, (step + 1) / 200) * min(1.0, max(0.0, (1 - done) / (1 - hold)))


def windows(ids: Tensor, batch: int, generator: torch.Generator):
    """Batches [batch, CONTEXT + 1] for ever; yields (epoch, rows)."""
    epoch = 0
    span = torch.arange(CONTEXT + 1, device=ids.device)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        order = torch.randperm((len(ids) - offset - 1) // CONTEXT, generator=generator).to(ids.device)
        for i in range(0, len(order) - batch + 1, batch):
            yield epoch + i / len(order), ids[(order[i : i + batch, None] * CONTEXT + offset + span)].long()
        epoch += 1


def write_model(model: LlamaForCausalLM, out: Path) -> None:
    """bf16 weights and a config.json that transformers 4 and 5 both read."""
    model.save_pretrained(out)
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{
            k: getattr(c, k)
            for k in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_act",
                "max_position_embeddings",
                "rms_norm_eps",
                "initializer_range",
                "attention_bias",
                "mlp_bias",
                "attention_dropout",
            )
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        **{k: getattr(c, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=2.45, help="for everything: reading, compiling, training, evaluation"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--weight-decay", type=float, default=0.6, help="of the matrices of the blocks; 0.1 for the embedding"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.1,
        help="standard deviation of the weight noise, in units of each matrix's root mean square",
    )
    parser.add_argument("--tiny", action="store_true", help="a very small model, to try the script on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with lzma.open(args.ids) as f:
        ids = torch.from_numpy(np.frombuffer(f.read(), np.uint16).astype(np.int32)).to(device)
    held = torch.tensor(tokenizer(args.heldout.read_text())["input_ids"])

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(TINY if args.tiny else SHAPE),
    )
    model = LlamaForCausalLM(config).to(device)
    model.config.use_cache = False
    n_params = sum(p.numel() for p in model.parameters())
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    muon = Muon(blocks, args.weight_decay)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False) if device == "cuda" else loss_of
    stream = windows(ids, args.batch, torch.Generator().manual_seed(SEED))
    try:
        compiled(next(stream)[1]).backward()
    except Exception as error:  # train all the same, only slower
        print("not compiled:", str(error)[:500], flush=True)
        compiled = loss_of
    model.zero_grad()
    ready = time.monotonic()
    budget = args.minutes * 60 - (ready - START) - 10
    print(
        f"{n_params / 1e6:.2f} M parameters, {len(ids) / 1e6:.1f} M tokens, held out {len(held)}; "
        f"ready after {ready - START:.0f} s, training for {budget:.0f} s",
        flush=True,
    )

    log = []
    step, done, running = 0, 0.0, torch.zeros((), device=device)
    probe = held[: 64 * CONTEXT // (16 if args.tiny else 1)]
    next_log, since = 0.0, 0
    while done < 1.0:
        epoch, rows = next(stream)
        scale = rate(done, step)
        noise = (
            [torch.randn_like(p) * (args.noise * p.detach().square().mean().sqrt()) for p in blocks]
            if args.noise
            else []
        )
        with torch.no_grad():
            if noise:
                torch._foreach_add_(blocks, noise)
        loss = compiled(rows)
        loss.backward()
        with torch.no_grad():
            if noise:
                torch._foreach_sub_(blocks, noise)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.lr * scale)
        for group in adam.param_groups:
            group["lr"] = args.lr * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        running += loss.detach()
        step += 1
        since += 1
        if step % 10 == 0 or device == "cpu":
            if device == "cuda":
                torch.cuda.synchronize()
            done = (time.monotonic() - ready) / budget
        if done >= next_log:
            with torch.autocast(device, torch.bfloat16):
                valid = math.log(evaluate.perplexity(model, probe, stride=CONTEXT, batch=64))
            seconds = time.monotonic() - ready
            tokens = step * args.batch * CONTEXT
            log.append(
                dict(
                    step=step,
                    tokens=tokens,
                    epoch=round(epoch, 3),
                    seconds=round(seconds, 1),
                    lr=args.lr * scale,
                    train_loss=running.item() / since,
                    heldout_loss=valid,
                )
            )
            print({k: round(v, 5) for k, v in log[-1].items()}, f"{tokens / seconds / 1e6:.2f} M tokens/s", flush=True)
            running.zero_()
            since = 0
            next_log += 1 / 60
    torch.cuda.synchronize() if device == "cuda" else None
    trained = time.monotonic() - ready

    with open(args.out / "loss.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, log[0].keys())
        writer.writeheader()
        writer.writerows(log)
    model.to(torch.bfloat16).eval()
    write_model(model, args.out)
    result = dict(
        parameters=n_params,
        steps=step,
        tokens=step * args.batch * CONTEXT,
        epochs=round(epoch, 2),
        training_seconds=round(trained, 1),
        seed=SEED,
        lr=args.lr,
        weight_decay=args.weight_decay,
        noise=args.noise,
        batch=args.batch,
        context=CONTEXT,
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        torch=torch.__version__,
    )
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    ppl = evaluate.table(model, held)
    result["heldout_perplexity"] = {k: round(v, 4) for k, v in ppl.items()}
    result["ratio"] = {k: round(v / ppl["bf16"], 4) for k, v in ppl.items()}
    result["total_seconds"] = round(time.monotonic() - START, 1)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for prompt in ("The file system", "When the user", "It was"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        print(
            repr(
                tokenizer.decode(
                    model.generate(
                        **inputs, max_new_tokens=50, do_sample=True, temperature=0.7, top_p=0.95, use_cache=True
                    )[0],
                    skip_special_tokens=True,
                )
            )
        )


if __name__ == "__main__":
    main()
