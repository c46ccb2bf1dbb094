"""llama.cpp on a Llama-shaped model with random weights: tokens a second of decoding and of a prefill, as JSON.

    python benchmarks/cpu/llama_gguf.py /tmp/model.gguf --format Q4_0 --threads 2

Runs in an environment of its own, with llama-cpp-python and gguf; imports nothing of kbit. Writes the F16 model, and
what llama.cpp's own quantizer makes of it, once; later runs find them. As in every Q4_0 file that it makes, the output
head is Q6_K, unless --keep-head leaves it in F16.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import statistics
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FORMATS = {"F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
FORMATS |= {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL}


def write(path: Path, args: argparse.Namespace) -> None:
    """A Llama model in F16 with normal weights (standard deviation 0.02) and a vocabulary of byte and dummy tokens."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(args.hidden)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.intermediate)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.hidden // args.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(args.vocab)
    writer.add_file_type(FORMATS["F16"])
    writer.add_tokenizer_model("llama")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"word{i}" for i in range(len(names), args.vocab)]
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * args.vocab)
    kinds = [2, 3, 3, *[6] * 256]
    writer.add_token_types(kinds + [1] * (args.vocab - len(kinds)))
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weight = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, weight.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(args.hidden, dtype=np.float32))

    kv = args.hidden // args.heads * args.kv_heads
    add("token_embd.weight", args.vocab, args.hidden)
    norm("output_norm.weight")
    add("output.weight", args.vocab, args.hidden)
    for layer in range(args.layers):
        p = f"blk.{layer}."
        norm(p + "attn_norm.weight")
        norm(p + "ffn_norm.weight")
        add(p + "attn_q.weight", args.hidden, args.hidden)
        add(p + "attn_k.weight", kv, args.hidden)
        add(p + "attn_v.weight", kv, args.hidden)
        add(p + "attn_output.weight", args.hidden, args.hidden)
        add(p + "ffn_gate.weight", args.intermediate, args.hidden)
        add(p + "ffn_up.weight", args.intermediate, args.hidden)
        add(p + "ffn_down.weight", args.hidden, args.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, args: argparse.Namespace) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.leave_output_tensor = FORMATS[args.format], args.threads, args.keep_head
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source}")


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    model = llama_cpp.Llama(
        str(path), n_ctx=args.prefill + args.decode + 8, n_batch=512, n_threads=args.threads,
        n_threads_batch=args.threads, verbose=False, n_gpu_layers=0,
    )  # fmt: skip
    prompt = [(7 * i) % (args.vocab - 300) + 300 for i in range(args.prefill)]
    prefills, steps = [], []
    for turn in range(args.turns + 1):  # the first turn warms up
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        prefilled = time.perf_counter()
        for _ in range(args.decode if turn else 2):
            model.eval([prompt[0]])
        if turn:
            prefills.append(args.prefill / (prefilled - begin))
            steps.append(args.decode / (time.perf_counter() - prefilled))
    return {"decode": statistics.median(steps), "prefill": statistics.median(prefills)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="of the F16 model")
    parser.add_argument("--format", choices=sorted(FORMATS), default="Q4_0")
    parser.add_argument("--keep-head", action="store_true")
    for name, default in (("hidden", 2048), ("intermediate", 8192), ("layers", 16), ("heads", 32), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocab", 32000), ("threads", 2), ("prefill", 256), ("decode", 32), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not args.path.exists():
        write(args.path, args)
    path = args.path
    if args.format != "F16":
        path = path.with_suffix(f".{args.format}{'-f16-head' if args.keep_head else ''}.gguf")
        if not path.exists():
            quantize(args.path, path, args)
    result = measure(path, args)
    print(
        json.dumps({**result, "bytes": path.stat().st_size, "version": importlib.metadata.version("llama_cpp_python")})
    )


if __name__ == "__main__":
    main()
