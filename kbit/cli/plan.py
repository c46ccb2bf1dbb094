"""`kbit plan`: what a model takes in each format, and what to take."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import (
    format_bytes,
    parse_formats,
    parse_memory,
    parse_params,
    print_json,
    print_table,
    resolve_model,
)

if TYPE_CHECKING:
    from kbit.plan import Plan

# Columns of the table, by field of `kbit.plan.Memory`; one that is empty in every row is not printed.
_COLUMNS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "host": "(paged)",
    "overhead": "overhead",
    "total": "total",
}


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Local model folder or hub name; only config.json is read.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="No model yet: a LLaMA of so many parameters, such as 7B.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the device: 12GB, 11.5GiB. [default: this machine's]")
    ] = None,
    train: Annotated[str, typer.Option(help="none, lora, qlora or full.")] = "none",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, paged-adamw8bit, lion, sgd, ...")] = "adamw8bit",
    context: Annotated[
        int | None, typer.Option(help="Tokens of one sequence. [default: 4096, or less if the model takes less]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Training: compute activations again instead of keeping them.")
    ] = True,
    formats: Annotated[str, typer.Option(help="Formats to list.")] = "bf16,int8,nf4-plain,nf4,fp4",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What fits: weights, cache, activations and training in every format; what to take, and how to load it."""
    if (model is None) == (params is None):
        raise ValueError("give either MODEL (a local folder or hub name) or --params such as 7B")
    names = parse_formats(formats)
    budget = None if memory is None else parse_memory(memory)
    if budget is not None and budget < 1_000_000:
        raise ValueError(f"--memory {memory} is {budget} bytes, too little for any model; write for example 12GB")
    count = None if params is None else parse_params(params)

    from kbit import plan as planning
    from kbit.plan.machine import best_device

    where = ""
    if budget is None:
        device = best_device()
        if device.memory is None:
            raise ValueError("this machine does not tell its memory; say it with --memory 12GB")
        budget, where = device.memory, f" ({device.model})"
    # The checks of numbers come before the work on the model.
    settings = planning.Settings(
        memory=budget,
        train=train,
        optimizer=optimizer,
        context=4096 if context is None else context,
        batch=batch,
        rank=lora_rank,
        gradient_checkpointing=gradient_checkpointing,
    )
    logging.getLogger("kbit").setLevel(logging.ERROR)  # what it would say is in the plan's notes
    if count is not None:
        skeleton = planning.from_params(count)
    else:
        assert model is not None
        skeleton = planning.from_pretrained(resolve_model(model, weights=False))
    if context is None:
        settings = planning.Settings(**{**vars(settings), "context": planning.default_context(skeleton)})
    result = planning.make_plan(skeleton, settings, names, name=model)
    if as_json:
        print_json(result.to_json())
    else:
        _print(result, where)


def _print(plan: Plan, where: str) -> None:
    settings = plan.settings
    task = "inference"
    if settings.train != "none":
        checkpointing = "with" if settings.gradient_checkpointing else "without"
        rank = "" if settings.train == "full" else f" of rank {settings.rank}"
        task = f"{settings.train} training{rank}, {settings.optimizer}, {checkpointing} gradient checkpointing"
    print(f"{plan.model}, {_count(plan.parameters)} parameters; {task}")
    print(f"context {settings.context}, batch {settings.batch}; memory {format_bytes(settings.memory)}{where}")

    memories = [{**vars(row.memory), "total": row.memory.total} for row in plan.rows]
    shown = [field for field in _COLUMNS if any(sizes[field] for sizes in memories)]
    rows = []
    for row, sizes in zip(plan.rows, memories, strict=True):
        longest = "-" if row.max_context is None else str(row.max_context)
        if row.obstacle is not None:
            rows.append([row.format, format_bytes(sizes["weights"]), *["-"] * (len(shown) - 1), "frozen", longest])
            continue
        cells = [format_bytes(sizes[field]) if sizes[field] else "-" for field in shown]
        rows.append([row.format, *cells, "yes" if row.fits else "no", longest])
    print_table(["format", *(f">{_COLUMNS[field]}" for field in shown), "fits", ">max context"], rows)

    for note in plan.notes:
        print(f"note: {note}")
    advice = plan.recommendation
    print(f"{'recommended' if advice.fits else 'does not fit as asked'}: {advice.text}")
    if advice.python is not None:
        print()
        print(advice.python)


def _count(number: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
