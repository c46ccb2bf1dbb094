"""`kbit run SCRIPT`: run a Python script, unchanged, with kbit in the place of bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.app import app


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="The script, or with -m a module.", metavar="SCRIPT [ARGS]...")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as for python -m.")] = False,
) -> None:
    """Run a script that was written for bitsandbytes, with kbit in its place.

    Everything after SCRIPT belongs to the script. Processes that it starts get kbit too.
    """
    if not module and not Path(script).exists():
        raise ValueError(f"there is no script {script}")
    environment = script_environment(os.environ)
    message = replaced_message()
    if message:
        print(f"kbit run: {message}", file=sys.stderr)
    command = [sys.executable, *(["-m"] if module else []), script, *context.args]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        # The script gets this process: its signals, its terminal and its exit code.
        os.execve(sys.executable, command, environment)
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


def script_environment(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The environment of a script whose `import bitsandbytes` gives kbit, in its child processes too."""
    from kbit.integrations.bitsandbytes.install import shim_path

    folders = [str(shim_path())]
    folders += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path != folders[0]]
    return {**environment, "PYTHONPATH": os.pathsep.join(folders)}


def replaced_message() -> str | None:
    """One line where a bitsandbytes is installed that the script will not see."""
    from kbit.integrations.bitsandbytes.install import real_bitsandbytes

    real = real_bitsandbytes()
    return None if real is None else f"kbit takes the place of {real}; run the script with python to use that one"
