"""`kbit finetune`: it learns, resumes exactly, and says what is wrong with its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")

from kbit.cli.app import run  # noqa: E402
from kbit.integrations import finetune as ft  # noqa: E402

SENTENCES = [f"The account number {i} holds {i * 7} shares of the fund." for i in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "accounts.txt"
    file.write_text("\n".join(SENTENCES))
    return file


def settings(model: Path, text: Path, output: Path, **options: object) -> ft.FinetuneSettings:
    return ft.FinetuneSettings(
        **{"steps": 20, "context": 32, "batch": 4, "learning_rate": 1e-2, "rank": 4, **options},  # type: ignore[arg-type]
        model=str(model),
        data=str(text),
        output=str(output),
    )


@pytest.mark.parametrize("options", [{"method": "qlora"}, {"method": "lora"}, {"format": "int8"}], ids=str)
def test_it_learns_and_leaves_an_adapter(model: Path, text: Path, tmp_path: Path, options: dict) -> None:
    from peft import PeftModel

    import kbit

    seen = []
    result = ft.finetune(
        settings(model, text, tmp_path / "out", **options), on_step=lambda *step: seen.append(step[:2])
    )
    assert result.loss_after < 0.95 * result.loss_before
    assert seen == [(step, 20) for step in range(1, 21)]
    assert result.peak_bytes > 0 and result.trainable_parameters > 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "losses.json", "loss.png", "run.json"} <= names
    assert "checkpoints" not in names and not any(name.startswith(".") for name in names)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=kbit.KbitConfig(bits=4))
    PeftModel.from_pretrained(base, tmp_path / "out")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(model: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = ft.finetune(settings(model, text, tmp_path / "whole"))

    def interrupt(step: int, total: int, loss: float | None) -> None:
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.finetune(settings(model, text, tmp_path / "halves"), on_step=interrupt)
    assert not (tmp_path / "halves/adapter_config.json").exists()
    steps = []
    resumed = ft.finetune(
        settings(model, text, tmp_path / "halves"), resume=True, on_step=lambda step, *_: steps.append(step)
    )
    assert steps[0] == 13 and steps[-1] == 20
    assert resumed.loss_before == whole.loss_before and resumed.loss_after == whole.loss_after
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("halves", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_cannot_be_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        ft.finetune(settings(model, text, tmp_path / "none"), resume=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text(json.dumps(vars(settings(model, text, tmp_path / "out", rank=8))))
    with pytest.raises(ValueError, match="other settings: rank 8, not 4"):
        ft.finetune(settings(model, text, tmp_path / "out"), resume=True)
    with pytest.raises(ValueError, match="not empty.*--resume"):
        ft.finetune(settings(model, text, tmp_path / "out"))


def test_examples_of_every_kind(model: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "the fund"}\n\n{"prompt": "The account", "completion": " holds shares"}\n')
    plain, pair = ft.read_examples(str(file), tokenizer, 32)
    assert plain["labels"] == plain["input_ids"] and plain["input_ids"][-1] == tokenizer.eos_token_id
    prompt = len(tokenizer("The account")["input_ids"])
    assert pair["labels"][:prompt] == [-100] * prompt
    assert pair["labels"][prompt:] == pair["input_ids"][prompt:]
    assert tokenizer.decode(pair["input_ids"], skip_special_tokens=True) == "The account holds shares"
    assert all(len(e["input_ids"]) <= 3 for e in ft.read_examples(str(file), tokenizer, 3)[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        ('{"text": "a"}\n{"question": "a"}', 'line 2 has none of "text"'),
        ('{"messages": []}', "no chat template"),
        ('{"prompt": "a b c d e f g h i j", "completion": "x"}', "fills the context of 4 tokens"),
        ("", "holds no text"),
    ],
)
def test_bad_jsonl_names_the_line(model: Path, tmp_path: Path, content: str, message: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        ft.read_examples(str(tmp_path / "data.jsonl"), tokenizer, 4)


def test_code_and_pickles_of_the_folder_are_never_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the command line's checks, and where somebody answers yes to transformers' question."""
    import builtins
    import shutil

    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "y")
    code = tmp_path / "code"
    shutil.copytree(model, code)
    (code / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(
        json.dumps({**config, "model_type": "of-its-own", "auto_map": {"AutoConfig": "own.Config"}})
    )
    with pytest.raises(ValueError):
        ft.load_base(settings(code, text, tmp_path / "a"))
    with pytest.raises(ValueError):
        ft.finetune(settings(code, text, tmp_path / "b"))
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(model).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        ft.load_base(settings(pickled, text, tmp_path / "c"))
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("kind", "message"), [("bert", "is not causal"), ("t5", "is a t5 model, not a causal")])
def test_only_causal_language_models(model: Path, text: Path, tmp_path: Path, kind: str, message: str) -> None:
    from tests.integrations import tiny_models

    folder = tiny_models.save(tiny_models.MODELS[kind](vocab_size=400), tmp_path / kind)
    for file in model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=message):
        ft.finetune(settings(folder, text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(text), "--steps", "3", "--context", "16", "--rank", "2", "--json"]
    assert run(["finetune", str(model), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert run(["finetune", str(model), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert "not empty" in capsys.readouterr().err
    assert run(["finetune", str(model), "--output", str(tmp_path / "b"), *arguments, "--method", "full"]) == 2
    assert "unknown method 'full'" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_shipped_model_learns_the_domain_that_ships(tmp_path: Path) -> None:
    """A short run of what the README shows: the held-out loss falls on a domain that the model has not seen."""
    import kbit

    assets = Path(kbit.demo_model()).parent
    for name in ("domain_train.txt", "domain_eval.txt"):
        (tmp_path / name).write_text(
            (assets / name).read_text(encoding="utf-8")[: 60_000 if "train" in name else 8_000]
        )
    result = ft.finetune(
        ft.FinetuneSettings(
            model=kbit.demo_model(),
            data=str(tmp_path / "domain_train.txt"),
            eval_data=str(tmp_path / "domain_eval.txt"),
            output=str(tmp_path / "out"),
            steps=12,
            context=128,
            learning_rate=2e-3,
        )
    )
    assert result.loss_after < result.loss_before - 0.03
