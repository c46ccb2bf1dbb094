"""Build the corpus: download the packages of data.json, keep their English prose, deduplicate, split.

    python collect.py --work DIR            # DIR gets deb/, x/ and the results train.jsonl, heldout.txt, domain_*.txt

A document is one file (or one chapter, or one run of dictionary entries). Splits are by document; what a training
paragraph shares with a held-out text is then removed from training. Packages already under DIR/deb are not fetched
again. Deterministic for given packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import subprocess
from pathlib import Path

import extract

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "kbit" / "assets"
SEED = 20261120
CAP = 12_000_000  # characters a source may give, so that no project dominates
SKIP = re.compile(
    r"change_?log|/news\b|release[-_]?notes|/releases?/|copyright|README\.Debian|NEWS|TODO|AUTHORS|THANKS|genindex|modindex|/search|bookindex|_static/|"
    r"/(ar|bg|ca|cs|da|de|el|eo|es|eu|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|nb|nl|nn|pl|pt|pt[-_](br|BR)|ro|ru|sk|sl|sr|sv|tr|uk|vi|zh[-_]?\w*)/|"
    r"\.(de|es|fr|ja|ko|pt-br|ru|tr|zh-cn|da)(\.utf8)?\.?(html|txt)?$|licen[cs]e|gfdl|gpl|whatsnew/changelog|autoindex|/(?:index|toc|contents)\.html$",
    re.I,
)
MAN = re.compile(r"/usr/share/man/man\d/")


def fetch(work: Path, packages: list[str]) -> None:
    deb, x = work / "deb", work / "x"
    deb.mkdir(parents=True, exist_ok=True)
    missing = [p for p in packages if not list(deb.glob(f"{p}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=deb, check=True)
    for p in packages:
        if not (x / p).exists():
            subprocess.run(["dpkg", "-x", str(next(deb.glob(f"{p}_*.deb"))), str(x / p)], check=True)


def files_of(root: Path, source: dict) -> list[Path]:
    include = re.compile(source.get("include", "."))
    exclude = re.compile(source["exclude"]) if "exclude" in source else None
    found = []
    has_sources = any(root.rglob("_sources"))
    for folder, _, names in sorted(os.walk(root)):
        for name in sorted(names):
            path = Path(folder) / name
            rel = "/" + str(path.relative_to(root))
            if path.is_symlink() or SKIP.search(rel) or not include.search(rel) or (exclude and exclude.search(rel)):
                continue
            bare = rel[:-3] if rel.endswith(".gz") else rel
            if has_sources and "/_sources/" not in rel and not MAN.search(rel):
                continue
            if (
                bare.endswith(
                    (".html", ".htm", ".html.en", ".xhtml", ".page", ".pod", ".txt", ".text", ".md", ".rst", ".dict.dz")
                )
                or MAN.search(rel)
                or name == "Rdata.rdb"
                or bare.endswith("janeaustenr.rdb")
            ):
                found.append(path)
    if (
        any(f.suffix == ".html" for f in found) and not has_sources and "include" not in source
    ):  # the same manual as text: once is enough
        found = [f for f in found if not re.search(r"\.(txt|text)(\.gz)?$", f.name) or f.name.startswith("jargon")]
    return found


def documents(job: tuple[str, str, str]) -> list[tuple[str, str, list[str]]]:
    """(package, path, paragraphs) of one file; dictionaries and novels give several."""
    package, root, file = job
    path = Path(file)
    rel = "/" + str(path.relative_to(root))
    try:
        if path.suffix == ".rdb":
            return novels(package, rel, extract.read_rdb(path.read_bytes()))
        text = extract.load(path)
    except Exception:
        return []
    if rel.endswith(".dict.dz"):
        entries = extract.read_dict(text)
        groups = [entries[i : i + 40] for i in range(0, len(entries), 40)]
        return [
            (package, f"{rel}#{i}", [p for head, body in g for p in (["# " + head, *body])])
            for i, g in enumerate(groups)
        ]
    if re.search(r"\.(html?|xhtml|page)(\.en)?(\.gz)?$", rel):
        paragraphs = extract.read_html(text)
    elif ".pod" in rel:
        paragraphs = extract.read_pod(text)
    elif MAN.search(rel):
        paragraphs = extract.read_man(text)
    else:
        paragraphs = extract.read_text(text)
    parts = [
        paragraphs[i : i + 150] for i in range(0, len(paragraphs), 150)
    ]  # a book in one file: parts, so that a split has a grain
    return [(package, f"{rel}#{i}" if len(parts) > 1 else rel, part) for i, part in enumerate(parts)]


def novels(package: str, rel: str, lines: list[str]) -> list[tuple[str, str, list[str]]]:
    out, chapter, buf = [], [], []
    for line in lines:
        if re.match(r"\s*(CHAPTER|Chapter|VOLUME) ", line):
            out.append((package, f"{rel}#{len(out)}", chapter))
            chapter = []
        elif not line.strip():
            chapter.append(extract.clean(" ".join(buf)).replace("_", "").replace("--", " -- "))
            buf = []
        else:
            buf.append(line)
    return [*out, (package, f"{rel}#{len(out)}", chapter)]


def key(paragraph: str) -> bytes:
    return hashlib.blake2b(re.sub(r"[^a-z]", "", paragraph.lower()).encode(), digest_size=8).digest()


def shingles(text: str, n: int = 8) -> set[int]:
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)}


def tidy(paragraphs: list[str], seen: set[bytes]) -> str:
    """Prose paragraphs not seen before, each heading only before a paragraph that stays."""
    out: list[str] = []
    heading = None
    for p in paragraphs:
        if p.startswith("# "):
            p = re.sub(r"^(\d+(\.\d+)*\.?|[A-Z]\.\d[\d.]*)\s+", "", p[2:].strip())
            heading = p if extract.is_heading(p) else None
        elif extract.is_prose(p):
            k = key(p)
            if k in seen:
                continue
            seen.add(k)
            if heading:
                out.append(heading)
                heading = None
            out.append(p)
    return "\n\n".join(out)


def take(docs: list[dict], budget: int, rng: random.Random, low: int, high: int, per_source: int) -> list[dict]:
    """Documents of middling length, a few from every source, up to `budget` characters."""
    chosen, count, total = [], {}, 0
    for doc in rng.sample(docs, len(docs)):
        if low <= len(doc["text"]) <= high and count.get(doc["source"], 0) < per_source:
            chosen.append(doc)
            count[doc["source"]] = count.get(doc["source"], 0) + 1
            total += len(doc["text"])
            if total >= budget:
                break
    return chosen


def without_overlap(docs: list[dict], kept_out: set[int]) -> tuple[list[dict], int]:
    """Drop training paragraphs that share an eighth or more of their 8-word runs with a held-out text."""
    out, removed = [], 0
    for doc in docs:
        keep = []
        for p in doc["text"].split("\n\n"):
            s = shingles(p)
            if s and len(s & kept_out) > len(s) / 8:
                removed += 1
            else:
                keep.append(p)
        text = "\n\n".join(keep)
        if len(text) > 500:
            out.append({**doc, "text": text})
    return out, removed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    data = json.loads((HERE / "data.json").read_text())
    sources = data["sources"]
    fetch(args.work, [s["package"] for s in sources])

    jobs = []
    for s in sources:
        root = args.work / "x" / s["package"]
        jobs += [(s["package"], str(root), str(f)) for f in files_of(root, s)]
    with multiprocessing.Pool() as pool:
        raw = [d for part in pool.imap(documents, jobs, chunksize=32) for d in part]

    rng = random.Random(SEED)
    roles = {s["package"]: s.get("role", "train") for s in sources}
    seen: set[bytes] = set()
    docs, size = [], {}
    order = rng.sample(range(len(raw)), len(raw))
    domain_raw = [raw[i] for i in range(len(raw)) if roles[raw[i][0]] == "domain"]
    for i in order:
        package, path, paragraphs = raw[i]
        if roles[package] == "domain" or size.get(package, 0) > CAP:
            continue
        text = tidy(paragraphs, seen)
        if len(text) < 600 or "gnucash" in text.lower():
            continue
        size[package] = size.get(package, 0) + len(text)
        docs.append({"source": package, "path": path, "text": text})

    domain_seen: set[bytes] = set()
    domain = [{"source": p, "path": f, "text": tidy(t, domain_seen)} for p, f, t in domain_raw]
    domain = [d for d in domain if len(d["text"]) > 400]
    rng.shuffle(domain)
    evaluation, training, n = [], [], 0
    for d in domain:
        if n < 50_000:
            evaluation.append(d)
            n += len(d["text"])
        else:
            training.append(d)
    out_eval = set().union(*(shingles(d["text"]) for d in evaluation))
    training, _ = without_overlap(training, out_eval)
    cut, n = [], 0
    for d in training:
        if n < 300_000:
            cut.append(d)
            n += len(d["text"])

    held = take(docs, 200_000, rng, 1500, 9000, 3)
    chosen = {id(d) for d in held}
    kept_out = set().union(*(shingles(d["text"]) for d in [*held, *evaluation, *cut]))
    train, removed = without_overlap([d for d in docs if id(d) not in chosen], kept_out)
    rng.shuffle(train)

    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, group in (("heldout", held), ("domain_train", cut), ("domain_eval", evaluation)):
        (ASSETS / f"{name}.txt").write_text("\n\n\n".join(d["text"] for d in group) + "\n")
    with open(args.work / "train.jsonl", "w") as f:
        for d in train:
            f.write(json.dumps(d) + "\n")

    for s in sources:
        p = s["package"]
        s["version"] = next((args.work / "deb").glob(f"{p}_*.deb")).name.split("_")[1].replace("%3a", ":")
        s["train_bytes"] = sum(len(d["text"].encode()) for d in train if d["source"] == p)
        s["heldout_documents"] = [d["path"] for d in held if d["source"] == p]
    data["train_bytes"] = sum(s["train_bytes"] for s in sources)
    data["train_documents"] = len(train)
    data["paragraphs_removed_for_overlap_with_heldout"] = removed
    (HERE / "data.json").write_text(json.dumps(data, indent=1) + "\n")
    for s in sorted(sources, key=lambda s: -s["train_bytes"]):
        print(f"{s['train_bytes'] / 1e6:7.2f} MB  {s['package']}")
    print(
        f"{data['train_bytes'] / 1e6:.1f} MB in {len(train)} documents, {removed} paragraphs removed; "
        f"held out {sum(len(d['text']) for d in held)}"
    )


if __name__ == "__main__":
    main()
