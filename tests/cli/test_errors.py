"""Every mistake of a user is one sentence on stderr and exit code 2: no traceback, nothing on stdout."""

from __future__ import annotations

import builtins
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kbit.cli import app as app_module
from kbit.cli import common
from kbit.cli.app import one_sentence


def check(result, *words: str) -> None:  # type: ignore[no-untyped-def]
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("kbit: ") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


# Every command that takes MODEL, with what else it needs.
MODEL_COMMANDS = [
    ["plan", "MODEL", "--memory", "1GB"],
    ["generate", "MODEL", "hello"],
    ["eval", "MODEL", "--text", "TEXT"],
    ["quantize", "MODEL", "OUT"],
    ["finetune", "MODEL", "--data", "TEXT", "--output", "OUT"],
]


@pytest.fixture(params=MODEL_COMMANDS, ids=lambda command: command[0])
def command(request, tmp_path: Path):  # type: ignore[no-untyped-def]
    text = tmp_path / "text.txt"
    text.write_text("some text to evaluate on " * 20)

    def fill(model: object) -> list[str]:
        places = {"MODEL": str(model), "TEXT": str(text), "OUT": str(tmp_path / "out")}
        return [places.get(word, word) for word in request.param]

    return fill


def test_wrong_path(kbit_cli, command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check(kbit_cli(*command(tmp_path / "nowhere")), "there is no folder", "nowhere")


@pytest.mark.parametrize("name", ["no-such-model-name", "no-such-org/no-such-model"])
def test_a_name_that_the_hub_does_not_give(kbit_cli, command, name: str) -> None:  # type: ignore[no-untyped-def]
    check(kbit_cli(*command(name)), name, "neither a local folder nor a model")


def test_a_file(kbit_cli, command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    check(kbit_cli(*command(tmp_path / "model.gguf")), "is a file")


def test_weights_that_cannot_be_read(kbit_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A link to nothing, since root reads everything else."""
    from kbit.assets import demo_model

    shutil.copy(Path(demo_model()) / "config.json", tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    check(kbit_cli("quantize", tmp_path, tmp_path / "q"), "model.safetensors cannot be read")


def test_a_folder_without_a_model(kbit_cli, command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").mkdir()
    check(kbit_cli(*command(tmp_path / "empty")), "not a model folder", "config.json")


@pytest.mark.parametrize(
    ("content", "word"), [("{not json", "not valid JSON"), ("[1, 2]", "model_type"), ("{}", "model_type")]
)
def test_a_config_that_is_none(kbit_cli, command, tmp_path: Path, content: str, word: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(content)
    check(kbit_cli(*command(tmp_path / "broken")), "config.json", word)


def test_a_model_type_that_does_not_exist(kbit_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    check(kbit_cli("plan", tmp_path, "--memory", "1GB"), "no-such-type")


def test_a_damaged_config(kbit_cli, tmp_path: Path, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    check(kbit_cli("plan", tmp_path, "--memory", "1GB"), "config.json")


def test_weights_are_missing(kbit_cli, command, tmp_path: Path, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_llama / "config.json").read_text())
    arguments = command(tmp_path / "bare")
    if arguments[0] == "plan":
        assert kbit_cli(*arguments).code == 0
    else:
        check(kbit_cli(*arguments), "no weights")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--params", "1B", "--memory", "8GB", "--formats", "bf16,nf5"],
        ["generate", "MODEL", "hello", "--format", "nf5"],
        ["eval", "MODEL", "--formats", "nf5", "--text", "TEXT"],
        ["quantize", "MODEL", "OUT", "--format", "nf5"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_unknown_format(kbit_cli, arguments: list[str], tmp_path: Path, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    places = {"MODEL": str(tiny_llama), "TEXT": __file__, "OUT": str(tmp_path / "out")}
    check(kbit_cli(*(places.get(word, word) for word in arguments)), "nf5", "nf4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], ["MODEL", "--params"]),
        (["plan", "x", "--params", "7B"], ["either"]),
        (["plan", "--params", "7B", "--memory", "lots"], ["'lots'", "12GB"]),
        (["plan", "--params", "7B", "--memory", "12XB"], ["'12XB'"]),
        (["plan", "--params", "7B", "--memory", "12"], ["12 bytes", "12GB"]),
        (["plan", "--params", "7B", "--memory", "0GB"], ["'0GB'"]),
        (["plan", "--params", "7B", "--memory", "-5GB"], ["'-5GB'"]),
        (["plan", "--params", "seven", "--memory", "12GB"], ["'seven'"]),
        (["plan", "--params", "10", "--memory", "12GB"], ["fewer"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--train", "dpo"], ["'dpo'", "qlora"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--optimizer", "adamx"], ["'adamx'", "adamw"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--context", "0"], ["context"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--batch", "-1"], ["batch"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--batch", "two"], ["--batch"]),
        (["plan", "--params", "7B", "--memory", "12GB", "--lora-rank", "0"], ["rank"]),
        (["plan", "--nonsense"], ["--nonsense", "kbit plan --help"]),
        (["nonsense"], ["nonsense", "kbit --help"]),
        (["doctor", "extra"], ["extra"]),
    ],
)
def test_bad_arguments(kbit_cli, arguments: list[str], words: list[str]) -> None:  # type: ignore[no-untyped-def]
    check(kbit_cli(*arguments), *words)


@pytest.mark.parametrize(("package", "extra"), [("transformers", "kbit[hf]"), ("huggingface_hub", "kbit[hf]")])
def test_missing_extra(kbit_cli, monkeypatch, tiny_llama: Path, package: str, extra: str) -> None:  # type: ignore[no-untyped-def]
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    model = str(tiny_llama) if package == "transformers" else "org/name"
    check(kbit_cli("plan", model, "--memory", "1GB"), package, f"pip install '{extra}'")


def run_kbit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kbit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_real_command(tmp_path: Path) -> None:
    result = run_kbit("plan", str(tmp_path / "nowhere"), "--memory", "1GB")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("kbit: there is no folder") and result.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    result = run_kbit("plan", "--params", "seven", KBIT_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr and "parse_params" in result.stderr


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from kbit.cli.app import run; run(['--help']);"
        "print(time.perf_counter() - start, 'torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.split()[1] == "False"
    for name in app_module.COMMANDS:
        assert name in result.stdout


def test_no_arguments_print_the_help(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    result = kbit_cli()
    assert result.code == 0 and "plan" in result.out and result.err == ""


def test_version(kbit_cli) -> None:  # type: ignore[no-untyped-def]
    import kbit

    result = kbit_cli("--version")
    assert result.code == 0 and result.out == f"kbit {kbit.__version__}\n"


def test_an_interrupt_is_130(kbit_cli, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def interrupt(**kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module, "app", interrupt)
    result = kbit_cli("doctor")
    assert result.code == 130 and result.err == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files")
def test_places_that_take_no_files_are_said_before_the_work(kbit_cli, tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    check(kbit_cli("quantize", "demo", "/proc/q"), "/proc/q cannot be written", "give a place where you may")
    check(kbit_cli("finetune", "demo", "--data", text, "--output", "/proc/f"), "/proc/f cannot be written")
    report = ("--report", "/proc/r.html")
    check(kbit_cli("eval", "demo", "--formats", "bf16", "--text", text, *report), "/proc/r.html cannot be written")


# The command, which waits where it is about to open a file in a temporary folder that holds one already.
HELD_AT_THE_SECOND_FILE = """
import os, sys, time

def hold(event, arguments):
    if event == "open":
        folder = os.path.dirname(str(arguments[0]))
        if folder.endswith(".tmp") and os.path.basename(folder).startswith(".q.") and os.listdir(folder):
            time.sleep(120)

sys.addaudithook(hold)
from kbit.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_leaves_nothing_half_written(signum: int, code: int, tmp_path: Path) -> None:
    held = [sys.executable, "-c", HELD_AT_THE_SECOND_FILE, "quantize", "demo", str(tmp_path / "q")]
    process = subprocess.Popen(held)
    while not glob.glob(f"{tmp_path}/.q.*.tmp/*", include_hidden=True):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(60) == code
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kbit", "plan", "--params", "7B", "--memory", "12GB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.wait(60)
    assert errors == ""


def test_unexpected_errors_are_one_sentence_too(kbit_cli, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def broken(**kwargs: object) -> None:
        raise KeyError("what nobody\nthought of")

    monkeypatch.setattr(app_module, "app", broken)
    check(kbit_cli("doctor"), "unexpected error", "KeyError", "KBIT_DEBUG=1")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (ModuleNotFoundError("x", name="matplotlib.pyplot"), "pip install 'kbit[report]'"),
        (ModuleNotFoundError("x", name="something"), "pip install something"),
        (ValueError(), "unexpected error, ValueError"),
        (OSError(28, "No space left on device"), "the disk or a quota is full: free some space or write elsewhere"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8 vs 4"), "perhaps the disk is full"),
    ],
)
def test_sentences(error: Exception, sentence: str) -> None:
    assert sentence in one_sentence(error) and "\n" not in one_sentence(error)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("12gb", 12 * 10**9),
        ("12 GB", 12 * 10**9),
        ("12G", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("12000MB", 12 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (".5TB", 5 * 10**11),
        ("4000000000", 4 * 10**9),
        ("8000kB", 8_000_000),
    ],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert common.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "12 GB 3", "1e9", "12GBit", "0", "12,5GB", "٣GB", "nan", "inf GB"])
def test_no_memory_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        common.parse_memory(text)


@pytest.mark.parametrize(
    ("text", "count"), [("7B", 7e9), ("7b", 7e9), ("1.1B", 1.1e9), ("350M", 35e7), ("8000000", 8e6)]
)
def test_params(text: str, count: float) -> None:
    assert common.parse_params(text) == int(count)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (1_234_567, "1.2 MB"), (14 * 10**9, "14.0 GB")],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert common.format_bytes(size) == text


def test_formats_are_taken_once_and_in_order() -> None:
    assert common.parse_formats("nf4, bf16,nf4") == ["nf4", "bf16"]
    with pytest.raises(ValueError, match="no format"):
        common.parse_formats(" , ")


def test_json_has_no_infinities(capsys) -> None:  # type: ignore[no-untyped-def]
    common.print_json({"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


def test_tables_print_brackets_as_they_are(capsys) -> None:  # type: ignore[no-untyped-def]
    common.print_table(["a", ">b"], [["[red]x[/red]", 1], ["y" * 150, 22]])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and "y" * 150 in out
