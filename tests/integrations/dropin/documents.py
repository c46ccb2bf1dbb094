"""The Python in a document that explains bitsandbytes, made into one script that runs on a machine without a hub.

What is changed is listed here and nowhere else:
- the names of models become a local folder, and "cuda" the device at hand (without a GPU, max_memory has no GPU 0);
- on a CPU, which has no fp16 training, fp16=True becomes bf16=True, use_cpu=True: its own 16-bit training;
- keywords that a version of transformers no longer takes become what that version takes instead (SUCCESSORS);
- a preamble defines what a document leaves undefined (PREAMBLE).
"""

from __future__ import annotations

import ast
import re

# Transformers 5: `from_pretrained` takes no load_in_8bit / load_in_4bit (the config object does), and Trainer takes its
# tokenizer as processing_class. Both are read from the call's keywords.
SUCCESSORS = {
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "tokenizer": "processing_class",
}

# Names that no document defines: data to train on. `torch` is imported by some of them only after its first use.
PREAMBLE = """
import torch
import transformers

_ids = torch.arange(2, 18)
train_dataset = [{"input_ids": _ids, "attention_mask": torch.ones_like(_ids), "labels": _ids} for _ in range(8)]
dataloader = [{"input_ids": _ids.view(1, -1), "labels": _ids.view(1, -1)} for _ in range(2)]
dataloader = [{k: v.to(DEVICE) for k, v in batch.items()} for batch in dataloader]
"""


def python_of(text: str) -> list[str]:
    """The pieces of Python in a document: its ```python blocks, or, where fences are lost, the lines that are code."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return blocks or ["\n".join(_code_lines(text))]


_CODE = re.compile(r"(from [\w.]+ import |import \w|#|with .+:(\s*#.*)?$|print\(|[A-Za-z_]\w* = )")


def _code_lines(text: str) -> list[str]:
    """Lines of code among prose, with the one indentation that matters here restored: the line after a `with`."""
    lines: list[str] = []
    depth, indent = 0, ""
    for line in text.splitlines():
        if depth == 0 and not _CODE.match(line):
            continue
        lines.append(indent + line)
        code = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|#.*", "", line)
        depth += sum(code.count(c) for c in "([{") - sum(code.count(c) for c in ")]}")
        if depth == 0 and not line.startswith("#"):
            indent = "    " if code.rstrip().endswith(":") else ""
    return lines


class _Localize(ast.NodeTransformer):
    def __init__(self, model: str, device: str, transformers_major: int) -> None:
        self.model, self.device, self.major = model, device, transformers_major
        self.changed: list[str] = []

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            if node.value == "model-name" or re.fullmatch(r"meta-llama/[\w.-]+", node.value):
                return ast.Constant(self.model)
            if node.value == "cuda":
                return ast.Constant(self.device)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for keyword in node.keywords:
            if name == "TrainingArguments" and keyword.arg == "fp16" and self.device == "cpu":
                keyword.arg = "bf16"
                node.keywords = [*node.keywords, ast.keyword("use_cpu", ast.Constant(True))]
                self.changed.append("fp16")
            if keyword.arg == "max_memory" and self.device == "cpu" and isinstance(keyword.value, ast.Dict):
                entries = zip(keyword.value.keys, keyword.value.values, strict=True)
                kept = [(k, v) for k, v in entries if not (isinstance(k, ast.Constant) and k.value == 0)]
                keyword.value = ast.Dict([k for k, _ in kept], [v for _, v in kept])
            if self.major < 5:
                continue
            if name == "from_pretrained" and keyword.arg in ("load_in_8bit", "load_in_4bit"):
                self.changed.append(keyword.arg)
                call = f"transformers.BitsAndBytesConfig({keyword.arg}=True)"
                keyword.arg, keyword.value = "quantization_config", ast.parse(call, mode="eval").body
            elif name == "Trainer" and keyword.arg == "tokenizer":
                self.changed.append(keyword.arg)
                keyword.arg = SUCCESSORS["tokenizer"]
        return node


def script_of(text: str, model: str, device: str, transformers_major: int) -> tuple[str, list[str]]:
    """One script in one namespace, and the keywords that were replaced in it."""
    localize = _Localize(model, device, transformers_major)
    parts = [f"DEVICE = {device!r}", PREAMBLE]
    for block in python_of(text):
        tree = localize.visit(ast.parse(block))
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
    return "\n\n".join(parts) + "\n", localize.changed
