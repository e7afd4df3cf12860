"""Builds the demo stores of `data/demo` again: text, image, audio, and documents of all three.

    apt-get install python3-doc espeak-ng          # Debian 12: the Python 3.11 documentation, speech synthesis
    pip install scikit-learn                       # handwritten digits; brings scipy for resampling
    python scripts/build_demo_store.py --out data/demo

Takes less than a minute. Everything random is seeded: with the same versions of the three inputs the stores come out the same.
`data/demo/README.md` says what the parts are and under which licences.
"""

import argparse
import io
import pathlib
import random
import re
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator

import numpy as np

from v4train.data import document, media, store, tokenizer

PATCH = 4
TOKENIZER = tokenizer.ByteTokenizer()
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = (*DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
TEXT_ORIGIN = "Prose of the Python 3.11 documentation (Debian package python3.11-doc), markup and code examples removed"
IMAGE_ORIGIN = "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), as shipped with scikit-learn; captions by this script"
AUDIO_ORIGIN = "Digit names synthesised with espeak-ng; transcripts by this script"
SPLIT_BYTES = 4_000  # short sections are joined until a document has this many
TEXT_FOLDERS = ("tutorial", "howto", "faq", "reference", "using", "extending", "installing", "distributing", "whatsnew", "library")
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5")


def clean_inline(text: str) -> str:
    """A paragraph without reStructuredText markup."""
    text = re.sub(r":pep:`(\d+)`", r"PEP \1", text)
    text = re.sub(r"\s*\((?:Contributed|Patch|Suggested|Implemented|Added|Proposed|Reported|Fixed|Initial)\b[^()]*\.?\)", "", text)
    text = re.sub(r"\s*\((?:See |and )?:(?:issue|gh|source):`[^()]*\)", "", text)
    text = re.sub(r":[a-zA-Z0-9:+-]+:`!?~?([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[a-zA-Z0-9:+-]+:`[!~]?\.?([^`]*)`", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"`([^`]*)`_*", r"\1", text)
    text = re.sub(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])", r"\1", text)
    text = re.sub(r"\|[a-z]+\|", "", text)
    text = re.sub(r"\s*\[[#\w]+\]_", "", text)
    return re.sub(r"\s+", " ", text.replace("\\ ", "").replace("\\", "")).strip()


def is_prose(text: str) -> bool:
    """Whether a cleaned paragraph reads like sentences rather than like code, a table or a list of names."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) > 60 and letters > 0.87 * len(text) and text[0].isalpha() and text.rstrip('")').endswith((".", ":", "?", "!"))


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Indentation and text of the blocks between blank lines."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield len(block[0]) - len(block[0].lstrip()), "\n".join(block)
            block = []


def page_sections(page: str, *, deepest: int) -> list[str]:
    """Cleaned sections of a page: a heading, then its paragraphs down to an indentation of ``deepest``."""
    sections: list[list[str]] = [[]]
    rule = re.compile(r"^([=\-~^*#+\"'.`])\1{2,}$")
    literal = -1  # indentation of the paragraph whose "::" opened a literal block
    for indent, block in paragraphs(page.expandtabs(8).splitlines()):
        if 0 <= literal < indent:
            continue
        literal = indent if block.rstrip().endswith("::") else -1
        lines = [line.strip() for line in block.split("\n")]
        if len(lines) in (2, 3) and rule.match(lines[-1]):
            sections.append([clean_inline(lines[-2])])
            continue
        if re.match(r"\.\. (note|warning|seealso)::$", lines[0]):
            lines, literal = lines[1:], -1
        if indent > deepest or not lines or lines[0].startswith(("..", ":", "|", "+-", ">>>")) or rule.match(lines[0]):
            continue
        for item in re.split(r"\n(?=(?:\*|-|#\.|\d+\.) )", "\n".join(lines)):
            text = clean_inline(re.sub(r"^(\*|-|#\.|\d+\.)\s+", "", item))
            text = re.sub(r"(?<=\.) ?:+$|(?<=\)) :+$", "", text).replace("::", ":")
            if is_prose(text):
                sections[-1].append(text)
    return ["\n\n".join(section) for section in sections if len(section) > 1]


def text_documents(root: pathlib.Path) -> Iterator[document.Document]:
    """Documents of a few kilobytes, each from one page; a page is held out as a whole."""
    for folder in TEXT_FOLDERS:
        for path in sorted((root / folder).glob("*.rst.txt")):
            key, joined = f"python-doc/{folder}/{path.name.removesuffix('.rst.txt')}", ""
            for section in page_sections(path.read_text(), deepest=0 if folder == "library" else 8):
                joined += ("\n\n" if joined else "") + section
                if len(joined) >= SPLIT_BYTES:
                    yield document.compose([joined + "\n"], key=key, tokenizer=TOKENIZER)
                    joined = ""
            if len(joined) > 300:
                yield document.compose([joined + "\n"], key=key, tokenizer=TOKENIZER)


def with_article(n: int) -> str:
    return f"{'an' if n == 8 else 'a'} {DIGITS[n]}"


def fact(n: int, rng: random.Random) -> str:
    """A sentence that is only right for this digit."""
    name, parity = DIGITS[n], "even" if n % 2 == 0 else "odd"
    facts = [
        f"{name.capitalize()} is an {parity} number.",
        f"One more makes {NUMBERS[n + 1]}.",
        f"Twice {name} is {NUMBERS[2 * n]}.",
        f"{name.capitalize()} plus five is {NUMBERS[n + 5]}.",
        f"Its name has {NUMBERS[len(name)]} letters.",
        f"It is {'less than' if n < 5 else 'more than' if n > 5 else 'exactly'} five.",
        f"Nine minus {name} is {NUMBERS[9 - n]}.",
    ]
    if n:
        facts.append(f"It comes after {DIGITS[n - 1]}.")
    return rng.choice(facts)


def image_parts(image: media.Patches, *, n: int, rng: random.Random) -> list:
    """An image and words about it, in one of several orders."""
    name, after, before = DIGITS[n], fact(n, rng), fact(n, rng)
    said = rng.choice(
        [
            f"A handwritten digit: {name}.",
            f"This is {with_article(n)}.",
            f"The picture shows the digit {n}.",
            f"Somebody wrote {with_article(n)}.",
            f"A small grey {n}, written by hand.",
            f"The number in the picture is {name}.",
        ]
    )
    layout = rng.random()
    if layout < 0.45:
        return [image, f"{said} {after}\n"]
    if layout < 0.6:
        return [image, f"{said}\n"]
    if layout < 0.8:
        return [
            rng.choice(["Which digit is this? ", "Read the number: ", "What has been written here? "]),
            image,
            f" It is {with_article(n)}. {after}\n",
        ]
    return [f"{said} {before}\n", image]


def audio_parts(clip: np.ndarray, *, n: int, rng: random.Random) -> list:
    """A clip and its transcript, in one of several orders."""
    name, after = DIGITS[n], fact(n, rng)
    said = rng.choice(
        [
            f"The voice says: {name}.",
            f"Somebody says {name}.",
            f"Spoken digit: {n}.",
            f"What you hear is the number {name}.",
            f"A voice reads out {name}.",
        ]
    )
    layout = rng.random()
    if layout < 0.45:
        return [clip, f"{said} {after}\n"]
    if layout < 0.6:
        return [clip, f"{said}\n"]
    if layout < 0.8:
        return [rng.choice(["Which number is spoken? ", "Listen: ", "Write down what you hear: "]), clip, f" {name}. {after}\n"]
    return [f"{said}\n", clip]


def trio_parts(image: media.Patches, clip: np.ndarray, *, shown: int, spoken: int, rng: random.Random) -> list:
    """An image, a clip and words that need both."""
    same = shown == spoken
    total = rng.choice([f"Together they make {NUMBERS[shown + spoken]}.", f"The sum is {NUMBERS[shown + spoken]}."])
    words = f"The picture shows {DIGITS[shown]} and the voice says {DIGITS[spoken]}."
    verdict = rng.choice(["They agree.", "Both are the same."] if same else ["They differ.", "They are not the same."])
    larger = "" if same else f" The {'picture' if shown > spoken else 'voice'} has the larger number."
    ending = rng.choice([f"{words} {verdict}\n", f"{words} {total}\n", f"{words}{larger} {verdict}\n", f"{words}\n"])
    layout = rng.random()
    if layout < 0.4:
        return [image, clip, ending]
    if layout < 0.8:
        return [clip, image, ending]
    return [f"Here is {with_article(shown)}: ", image, f" And here is the word {DIGITS[spoken]}: ", clip, f" {verdict}\n"]


def digit_images() -> list[tuple[media.Patches, int]]:
    """The 1,797 digits of scikit-learn as RGB, in its order, with their values."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return [
        (media.image_to_patches(np.repeat(image[..., None], 3, axis=-1), patch=PATCH), int(n))
        for image, n in zip(grey, bunch.target, strict=True)
    ]


def speak(text: str, *, voice: str, speed: int, pitch: int) -> np.ndarray:
    """dMel frames of a word, silence trimmed."""
    from scipy import signal

    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    with wave.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)) as file:
        rate, pcm = file.getframerate(), np.frombuffer(file.readframes(2**30), np.int16).astype(np.float64) / 32768
    pcm = signal.resample_poly(pcm, media.SAMPLE_RATE, rate)
    loud = np.flatnonzero(np.abs(pcm) > 0.02 * np.abs(pcm).max())
    margin = media.SAMPLE_RATE // 50
    return media.dmel(pcm[max(0, loud[0] - margin) : loud[-1] + margin])


def clips(count: int, rng: random.Random) -> list[tuple[np.ndarray, int]]:
    """Spoken digits, no two of the same word, voice, speed and pitch."""
    settings: dict[tuple, None] = {}
    while len(settings) < count:
        digit = len(settings) % 10
        settings[(digit, rng.choice(VOICES) + rng.choice(VARIANTS), rng.randrange(120, 211, 10), rng.randrange(20, 81, 10))] = None
    return [(speak(DIGITS[n], voice=voice, speed=speed, pitch=pitch), n) for n, voice, speed, pitch in settings]


def image_documents(images: list, *, rng: random.Random) -> Iterator[document.Document]:
    for i, (image, n) in enumerate(images):
        yield document.compose(image_parts(image, n=n, rng=rng), key=f"digit/{i}", tokenizer=TOKENIZER)


def audio_documents(spoken: list, *, rng: random.Random) -> Iterator[document.Document]:
    """Single clips, and after every eight a pair with its sum; a clip is in one document only."""
    rest = iter(enumerate(spoken))
    for i, (clip, n) in rest:
        parts = audio_parts(clip, n=n, rng=rng)
        if i % 10 == 8:
            _, (second, m) = next(rest)
            parts = [clip, second, f"First {DIGITS[n]}, then {DIGITS[m]}: together {NUMBERS[n + m]}.\n"]
        yield document.compose(parts, key=f"speech/{i}", tokenizer=TOKENIZER)


def trio_documents(images: list, spoken: list, *, rng: random.Random) -> Iterator[document.Document]:
    """Half of the pairs agree. The key is the image's, so that an image that is held out is held out here too."""
    by_digit = {n: [i for i, (_, m) in enumerate(images) if m == n] for n in range(10)}
    for clip, n in spoken:
        shown = n if rng.random() < 0.5 else rng.choice([m for m in range(10) if m != n])
        i = by_digit[shown].pop(rng.randrange(len(by_digit[shown])))
        yield document.compose(trio_parts(images[i][0], clip, shown=shown, spoken=n, rng=rng), key=f"digit/{i}", tokenizer=TOKENIZER)


def write(path: pathlib.Path, documents: Iterator[document.Document], *, licence: str, origin: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with store.TokenStoreWriter(path, tokenizer=TOKENIZER, image_patch=PATCH, licence=licence, origin=origin) as writer:
        for item in documents:
            writer.add(item)
    finished = store.TokenStore.open(path)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: {len(finished)} documents, tokens {finished.manifest['tokens']}, {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("data/demo"))
    parser.add_argument("--python-doc", type=pathlib.Path, default=pathlib.Path("/usr/share/doc/python3.11/html/_sources"))
    arguments = parser.parse_args()
    if not arguments.python_doc.is_dir():
        sys.exit(f"{arguments.python_doc}: not there; `apt-get install python3-doc`, or give --python-doc")
    if not shutil.which("espeak-ng"):
        sys.exit("espeak-ng is not installed; `apt-get install espeak-ng`")
    rng = random.Random(20)
    images, spoken = digit_images(), clips(2400, rng)
    write(arguments.out / "text", text_documents(arguments.python_doc), licence="PSF-2.0", origin=TEXT_ORIGIN)
    write(arguments.out / "image", image_documents(images, rng=rng), licence="CC-BY-4.0", origin=IMAGE_ORIGIN)
    write(arguments.out / "audio", audio_documents(spoken[:1800], rng=rng), licence="CC0-1.0", origin=AUDIO_ORIGIN)
    trio = f"{IMAGE_ORIGIN}; {AUDIO_ORIGIN}"
    write(arguments.out / "trio", trio_documents(images, spoken[1800:], rng=rng), licence="CC-BY-4.0", origin=trio)


if __name__ == "__main__":
    main()
