"""English prose out of the formats in which documentation is packaged: HTML, man, POD, Mallard, plain text.

Every reader returns a list of paragraphs (one line each). What is not prose is dropped twice: by markup here (code,
tables, menus, indexes) and by `is_prose`, which looks at the words.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

BLOCK = {
    "p",
    "li",
    "dd",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "blockquote",
    "div",
    "section",
    "dt",
    "td",
    "title",
    "body",
    "article",
    "item",
    "info",
    "desc",
}
DROP = {
    "script",
    "style",
    "pre",
    "table",
    "nav",
    "header",
    "footer",
    "form",
    "svg",
    "noscript",
    "listing",
    "screen",
    "head",
    "button",
    "select",
    "textarea",
    "code-block",
}
VOID = {"br", "hr", "img", "meta", "link", "input", "area", "base", "col", "embed", "source", "wbr"}
DROP_CLASS = re.compile(
    r"\b(nav\w*|sidebar\w*|toc\w*|contents|related|footer\w*|header(bar)?|menu\w*|breadcrumb\w*|index\w*|genindex\w*|highlight\S*|sourcecode|programlisting|"
    r"screen|synopsis|literallayout|admonition-title|headerlink|footnote-?list|bottomnav|topsearch|cpylft|verbatim\w*|example-preformatted)\b",
    re.I,
)
STOP = set(
    "the of and to a in is that it for on with as be this are by or an from can not you if will at "
    "which when have may has "
    "used use one "
    "all your any was but other than more also its he his they we their there into only should no do does so "
    "each these such then i she her him my "
    "would were had been what how who them our out up some about where because".split()
)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
SPACE = re.compile(r"\s+")
TABLE = str.maketrans(
    {
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2212": "-",
        "\u00b6": "",
        "\u00ad": "",
        "\u200b": "",
        "\u2026": "...",
        "\u2022": "",
        "\ufeff": "",
        "\u2013": "-",
        "\uf0c1": "",
    }
)


def clean(text: str) -> str:
    """One paragraph on one line, with plain quotes and spaces."""
    return SPACE.sub(" ", text.translate(TABLE)).strip()


def is_prose(p: str) -> bool:
    """Whether a paragraph reads as English sentences: enough stop words, few symbols, and it ends like a sentence."""
    if not 60 <= len(p) <= 6000 or p[-1] not in ".!?:;\")'" or not (p[0].isalnum() or p[0] in "\"'("):
        return False
    words = WORD.findall(p)
    if len(words) < 10:
        return False
    letters = sum(c.isalpha() or c == " " for c in p)
    ascii_ = sum(ord(c) < 128 for c in p)
    stop = sum(w.lower() in STOP for w in words)
    symbols = sum(c in "{}<>=|\\_$#@/[]*+~^%&" for c in p)
    if letters < 0.86 * len(p) or ascii_ < 0.985 * len(p) or stop < 0.25 * len(words) or symbols > 0.025 * len(p):
        return False
    return sum(map(len, words)) / len(words) < 7.5


def is_heading(p: str) -> bool:
    return (
        3 < len(p) < 70
        and sum(c.isalpha() or c == " " for c in p) > 0.85 * len(p)
        and p[-1] not in ".,;"
        and p.isascii()
    )


class _Html(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.buf: list[str] = []
        self.stack: list[tuple[str, bool]] = []  # (tag, this element is dropped)
        self.dropped = 0

    def flush(self, heading: bool = False) -> None:
        text = clean("".join(self.buf))
        self.buf.clear()
        if text:
            self.out.append(("# " if heading else "") + text)

    def handle_starttag(self, tag, attrs):
        if tag in BLOCK:
            self.flush()
        if tag in VOID:
            self.buf.append(" ")
            return
        a = dict(attrs)
        names = f"{a.get('class') or ''} {a.get('id') or ''} {a.get('role') or ''}"
        drop = tag in DROP or bool(
            tag in ("div", "ul", "ol", "dl", "span", "a", "p", "section", "aside") and DROP_CLASS.search(names)
        )
        if tag in ("p", "li", "dt", "dd") and self.stack and self.stack[-1][0] == tag:
            self._pop()  # HTML that leaves paragraphs open
        self.stack.append((tag, drop))
        self.dropped += drop

    def _pop(self):
        _, drop = self.stack.pop()
        self.dropped -= drop

    def handle_endtag(self, tag):
        if tag in BLOCK:
            self.flush(heading=tag in ("h1", "h2", "h3", "h4", "title"))
        if any(t == tag for t, _ in self.stack[-12:]):
            while self.stack[-1][0] != tag:
                self._pop()
            self._pop()

    def handle_data(self, data):
        if not self.dropped:
            self.buf.append(data)


def read_html(text: str) -> list[str]:
    parser = _Html()
    parser.feed(text)
    parser.flush()
    return parser.out


ROFF_ESCAPE = [
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d+"), ""),
    (re.compile(r"\\\(lq|\\\(rq|\\\(dq|\\\*[lr]q"), '"'),
    (re.compile(r"\\\(aq|\\\(cq|\\\(oq"), "'"),
    (re.compile(r"\\\(em"), " -- "),
    (re.compile(r"\\\(en"), "-"),
    (re.compile(r"\\\(bu|\\\(co|\\\(rg"), ""),
    (re.compile(r"\\[&|^:/,%cz]"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[e\\]"), r"\\"),
    (re.compile(r"\\[~0 ]"), " "),
    (re.compile(r"\\\*?\(..|\\\*?\[[^]]*\]"), ""),
    (re.compile(r'\\".*'), ""),
]


def _roff(line: str) -> str:
    for pattern, to in ROFF_ESCAPE:
        line = pattern.sub(to, line)
    return line


def read_man(text: str) -> list[str]:
    """man(7) source. Pages in mdoc(7) or with tables come out empty."""
    if re.search(r"^\.Dd ", text, re.M):
        return []
    out: list[str] = []
    buf: list[str] = []
    skip = False

    def flush() -> None:
        joined = clean(" ".join(buf))
        buf.clear()
        if joined:
            out.append(joined)

    tag_next = False
    for line in text.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        m = re.match(r"[.']\s*([A-Za-z]+)\s*(.*)", line)
        if not m:
            if not skip:
                if not line.strip():
                    flush()
                else:
                    buf.append(_roff(line))
                    if tag_next:
                        flush()
                        tag_next = False
            continue
        name, rest = m.groups()
        if name in ("nf", "EX", "TS", "ds", "de", "ig", "SY"):
            flush()
            skip = True
        elif name in ("fi", "EE", "TE", "YS") or (skip and line.startswith("..")):
            skip = False
        elif name in ("SH", "SS", "Sh"):
            flush()
            skip = False
            out.append("# " + clean(_roff(rest)).strip('"').capitalize())
        elif name in ("PP", "P", "LP", "IP", "TP", "HP", "RS", "RE", "sp", "br", "TQ"):
            flush()
            tag_next = name == "TP"
        elif name in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB") and not skip:
            parts = [p.strip('"') for p in re.findall(r'"[^"]*"|\S+', _roff(rest))]
            buf.append(("" if len(name) == 2 and name != "SM" else " ").join(parts))
            if tag_next:
                flush()
                tag_next = False
    flush()
    return out


def read_pod(text: str) -> list[str]:
    out = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("=head"):
            out.append("# " + _pod(block.split(None, 1)[1] if " " in block else ""))
        elif block.strip() and block[0] not in " \t=":
            out.append(_pod(block))
    return out


def _pod(text: str) -> str:
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    for _ in range(3):
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"[A-Z]<<+ (.*?) >>+|[BCFIS]<([^<>]*)>", lambda m: m[1] or m[2] or "", text, flags=re.S)
    return clean(text.replace("E<gt>", ">").replace("E<lt>", "<"))


def read_text(text: str) -> list[str]:
    """Plain text, Markdown, reStructuredText: blocks between blank lines; indented code falls to `is_prose`."""
    out = []
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        lines = [x.strip() for x in block.strip().split("\n")]
        if len(lines) == 2 and re.fullmatch(r"[=\-~*#^]{3,}", lines[1]):
            out.append("# " + clean(lines[0]))
        else:
            joined = re.sub(r":\w+:`([^`]*)`|``([^`]*)``|`([^`]*)`_*", lambda m: m[1] or m[2] or m[3], " ".join(lines))
            out.append(clean(re.sub(r"(?<!\w)[_*]+|[_*]+(?!\w)", "", re.sub(r"^([*+-]|\d+[.)]) ", "", joined))))
    return out


def read_dict(text: str) -> list[tuple[str, list[str]]]:
    """A dictd database: entries start at column 0, with their text indented below."""
    entries: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n(?=\S)", text):
        head, _, body = block.partition("\n")
        paragraphs = [clean(re.sub(r"[{}]", "", re.sub(r"<[^>]*>", "", p))) for p in re.split(r"\n\s*\n", body)]
        entries.append((clean(head), paragraphs))
    return entries


def read_rdb(data: bytes) -> list[str]:
    """Strings of an R lazy-load database in order: chunks are a length, a type byte for xz or bzip2, a stream."""
    strings: list[str] = []
    i = 0
    while i + 5 < len(data):
        raw = None
        for kind in ("zlib", "bzip2", "xz"):
            try:
                if kind == "zlib":
                    stream, start = zlib.decompressobj(), i + 4
                elif kind == "bzip2":
                    stream, start = bz2.BZ2Decompressor(), i + 5
                else:
                    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
                    stream, start = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), i + 5
                raw = stream.decompress(data[start:])
                used = len(data) - i - len(stream.unused_data)
                break
            except Exception:
                continue
        if raw is None:
            i += 1
            continue
        i += used
        for m in re.finditer(rb"\x00\x04\x00\x09\x00\x00(..)", raw, re.S):
            n = int.from_bytes(m[1], "big")
            strings.append(raw[m.end() : m.end() + n].decode("utf-8", "replace"))
    return strings


def load(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    for encoding in ("utf-8", "latin-1"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return ""
