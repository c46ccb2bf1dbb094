"""Every code sample of the README and the guide runs, and every command they show does what it says.

A page's Python blocks share one namespace and run in order, as a reader would paste them. A console block's `$ kbit`
lines run in the same folder. A block that cannot run here says why in its info string: ```python skip="needs a GPU".
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# `make demo` runs in CI by itself, and takes minutes.
SLOW_COMMANDS = {"kbit demo"}


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, code, line) of each block of a page that is to run."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        language, info, code = match.groups()
        if language in ("python", "console") and "skip=" not in info:
            found.append((language, code, text.count("\n", 0, match.start()) + 2))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_samples_of_page_run(page: Path, tmp_path: Path) -> None:
    """One process a page; `compile` keeps the page's name and lines in tracebacks."""
    program = ["import subprocess, sys"]
    # Texts of the reader's own that a page names.
    for name in ("held-out.txt", "manual.txt"):
        (tmp_path / name).write_text((ROOT / "kbit/assets/heldout.txt").read_text(encoding="utf-8")[:20_000])
    for language, code, line in blocks(page):
        if language == "python":
            program.append(f"exec(compile({chr(10) * (line - 1) + code!r}, {str(page)!r}, 'exec'))")
            continue
        for command in re.findall(r"^\$ (.+)$", code, re.MULTILINE):
            words = shlex.split(command, comments=True)
            if words[0] == "kbit" and " ".join(words) not in SLOW_COMMANDS:
                call = [sys.executable, "-m", "kbit", *words[1:]]
                program.append(f"print({command!r}, flush=True); subprocess.run({call!r}, check=True)")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, f"{page.name}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def test_readme_shows_both_commands_first() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make demo" in first_screen and "make test" in first_screen
