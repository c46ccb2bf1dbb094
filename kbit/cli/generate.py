"""`kbit generate`: have a model continue a prompt, as it writes."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from kbit.cli.app import app
from kbit.cli.common import WEIGHT_FORMATS, parse_formats, print_json


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model folder, hub name, or demo for the shipped model.")],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    format_name: Annotated[
        str | None,
        typer.Option("--format", help=f"{', '.join(WEIGHT_FORMATS)}. Default: nf4, or as the model is stored."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token; 1 samples as trained.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when done instead of text as it comes.")] = False,
) -> None:
    """Write a continuation of PROMPT with MODEL in 4 or 8 bits, token by token."""
    names = parse_formats(format_name) if format_name is not None else None
    if names is not None and len(names) != 1:
        raise ValueError(f"generate takes one format, got {format_name}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or more, got {temperature}")
    from kbit.cli.models import formats_for, load_model, load_tokenizer, open_source, pad_token, pick_device

    place = pick_device(device)
    source = open_source(model)
    (name,) = formats_for(source, names, ["nf4"])
    tokenizer = load_tokenizer(source)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
    if ids.numel() == 0:
        raise ValueError("the prompt is empty; give the model something to continue")
    loaded = load_model(source, name, place)

    import torch
    from transformers import TextStreamer

    from kbit.eval.perplexity import check_causal, model_context

    check_causal(loaded, ids[0])
    limit = model_context(loaded)
    if limit is not None and ids.shape[1] + 1 > limit:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, and the model reads {limit} at most; shorten it")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 50}
    ids = ids.to(loaded.device)
    started = time.perf_counter()
    with torch.no_grad():
        out = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            pad_token_id=pad_token(tokenizer, loaded),
            streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    seconds = time.perf_counter() - started
    if as_json:
        new = out[0, ids.shape[1] :]
        print_json(
            {
                "model": model,
                "format": name,
                "prompt": prompt,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "tokens": new.numel(),
                "tokens_per_second": new.numel() / seconds,
            }
        )
