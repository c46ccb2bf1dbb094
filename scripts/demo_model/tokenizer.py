"""Train the byte-level BPE tokenizer and turn the corpus into token ids.

    python tokenizer.py --work DIR --out FOLDER --ids FILE.u16.xz

FOLDER gets tokenizer.json and tokenizer_config.json, which AutoTokenizer reads. Each document is followed by <eos>;
`<bos>` opens a text at inference and stands before each document in training.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 4096
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
# Words carry their leading space, digits stand alone, runs of line breaks stay together.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def build(texts: list[str]) -> Tokenizer:
    from tokenizers import Regex

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return tok


def save(tok: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the generic class, known to transformers 4 and 5
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    args = parser.parse_args()
    with open(args.work / "train.jsonl") as f:
        texts = [json.loads(line)["text"] for line in f]
    tok = build(texts)
    save(tok, args.out)
    ids: list[np.ndarray] = []
    eos = tok.token_to_id(EOS)
    for i in range(0, len(texts), 1000):
        ids += [np.array([*e.ids, eos], np.uint16) for e in tok.encode_batch(texts[i : i + 1000])]
    flat = np.concatenate(ids)
    args.ids.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(args.ids, "wb", preset=4) as f:
        f.write(flat.tobytes())
    print(
        f"{len(flat) / 1e6:.2f} M tokens, {sum(len(t.encode()) for t in texts) / len(flat):.3f} bytes a token, "
        f"{args.ids.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
