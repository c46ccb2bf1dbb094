"""The typer application and its error boundary.

A command is a module `kbit.cli.NAME` that says `@app.command()` over a function. Its top level imports typer and
helpers only; torch, transformers and the rest are imported inside the function, so that `kbit --help` is quick.
A command raises ordinary exceptions: `run` turns each into one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

# In the order of `kbit --help`.
COMMANDS = ("demo", "plan", "quantize", "generate", "eval", "finetune", "bench", "doctor", "run")

# Which extra of the distribution brings a module.
_EXTRAS = {
    "transformers": "hf",
    "accelerate": "hf",
    "tokenizers": "hf",
    "huggingface_hub": "hf",
    "peft": "peft",
    "matplotlib": "report",
    "jinja2": "report",
    "triton": "triton",
}

# The system, as Python and safetensors pass it on.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
# torch.save, which names no reason.
_NOT_WRITTEN = ("unexpected pos", "PytorchStreamWriter failed writing")

app = typer.Typer(
    name="kbit",
    help="Large language models in 8 and 4 bits: load, compare, convert and plan.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kbit import __version__

        print(f"kbit {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of `kbit` itself."""


def load_commands() -> None:
    """Import every command module, which registers it."""
    for name in COMMANDS:
        importlib.import_module(f"kbit.cli.{name}")


def one_sentence(error: BaseException) -> str:
    """What an exception says to a user, on one line."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "kbit":
        package = error.name.split(".")[0]
        extra = _EXTRAS.get(package)
        target = f"'kbit[{extra}]'" if extra else package
        return f"this needs the package {package}, which is not installed: pip install {target}"
    if any(said in str(error) for said in _DISK_FULL):
        return "a file could not be written whole, the disk or a quota is full: free some space or write elsewhere"
    if any(said in str(error) for said in _NOT_WRITTEN):
        return "a file could not be written whole (perhaps the disk is full): free some space or write elsewhere"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{place}"
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:  # what transformers says asks for an option that kbit does not have
        return "this model needs Python code of its own (auto_map in its folder), which kbit never runs"
    if isinstance(error, (ValueError, OSError, ImportError, TypeError)) and text:
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: take a smaller format, context or batch (kbit plan says what fits)"
    detail = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"unexpected error, {detail} (KBIT_DEBUG=1 shows where)"


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns its exit code: 0, 2 after an error (one sentence on stderr), 130 when interrupted.

    KBIT_DEBUG=1 lets exceptions through with their traceback.
    """
    # Before torch is imported: threads that wait for each other sleep. Spinning costs an idle machine nothing and makes
    # one that is shared ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = os.environ.get("KBIT_DEBUG", "") not in ("", "0")
    if not debug and list(argv[:1]) != ["run"]:  # what libraries say is then the script's to see
        _quiet_libraries()
    load_commands()
    try:
        code = app(args=list(argv) or ["--help"], prog_name="kbit", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except typer.Abort:
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`kbit plan ... | head`): nobody to tell. Keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the parser
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "kbit"
            sentence = f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"
        elif debug:
            raise
        else:
            sentence = one_sentence(error)
        print(f"kbit: {sentence}", file=sys.stderr)
        return 2


def leave_on_sigterm() -> None:
    """Have SIGTERM, which schedulers send, end a command as an error does: what is half written is removed."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def _quiet_libraries() -> None:
    """Warnings of libraries are for programmers; a command says what its user has to know itself."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed
