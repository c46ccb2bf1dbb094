"""`kbit finetune`: LoRA or QLoRA on a text, from one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app
from kbit.cli.common import format_bytes, print_json, progress, resolve_model


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="A local model folder, a hub name, or demo: the model that ships.")],
    data: Annotated[Path, typer.Option(help="Text (.txt) or one JSON object a line (.jsonl).")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the losses and their plot.")],
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out text. Default: the last twentieth of --data.")
    ] = None,
    method: Annotated[str, typer.Option(help="qlora: quantized base. lora: bf16 base.")] = "qlora",
    format: Annotated[
        str, typer.Option(help="Format of the base with qlora: nf4, nf4-plain, fp4, fp4-plain, int8.")
    ] = "nf4",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    alpha: Annotated[int, typer.Option(help="Adapters are scaled by alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout before the adapters.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules to adapt, comma-separated, or all-linear.")] = "all-linear",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    context: Annotated[int, typer.Option(help="Tokens an example.")] = 512,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 4,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Train LoRA adapters on a text; the base stays frozen, quantized with qlora."""
    from kbit.integrations.finetune import FinetuneSettings, finetune, open_run

    settings = FinetuneSettings(
        model=resolve_model(model),
        data=str(data),
        output=str(output),
        eval_data=None if eval_data is None else str(eval_data),
        method=method,
        format=format,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        epochs=epochs,
        steps=steps,
        learning_rate=lr,
        context=context,
        batch=batch,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    settings.check()
    open_run(settings, output, resume)  # says what is wrong with the folder before a progress bar starts
    bar, advance = progress("training", 1)
    done = 0

    def on_step(step: int, total: int, loss: float | None) -> None:
        nonlocal done
        text = "training" if loss is None else f"training, loss {loss:.3f}"
        bar.update(bar.tasks[0].id, total=total, description=text)
        advance(step - done)
        done = step

    with bar:
        result = finetune(settings, resume=resume, on_step=on_step)
    if as_json:
        print_json(result.to_json())
        return
    change = 100 * (result.loss_after / result.loss_before - 1)
    print(f"held-out loss   {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token ({change:+.1f}%)")
    print(f"trained         {result.trainable_parameters:,} parameters, {result.steps} steps, {result.seconds:.0f} s")
    print(f"peak memory     {format_bytes(result.peak_bytes)} ({result.peak_of})")
    print(f"adapter         {result.output}, with losses.json and loss.png")
