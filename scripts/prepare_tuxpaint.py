"""A real corpus of text, images and speech, offline: the stamps of Tux Paint and the Python documentation, as token stores.

    apt-get install tuxpaint-stamps-default python3.11-doc      # Debian 12; GPL-2 and PSF-2.0
    pip install 'v4train[prepare]'
    python scripts/prepare_tuxpaint.py
    v4train train configs/tuxpaint.yaml

The script lists which image, sound and caption belong together, and `v4train data prepare` does the rest with the specs of
`configs/prepare`. A stamp is a PNG; beside it are a text with a caption a language, and a sound a language. It may be killed and
started again at any time. The stores are derived from GPL-2 material: keep them out of repositories under other licences.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

SPECS = pathlib.Path(__file__).parents[1] / "configs" / "prepare"
LANGUAGES = ("en", "fr", "ru", "ca", "ro", "bg", "es", "be", "el", "da", "nl", "ml")
"""Those with sounds; English sounds have no language in their names."""


def captions(path: pathlib.Path) -> dict[str, str]:
    """Caption of a stamp by language: the first line is English, the others begin with ``fr.utf8=``."""
    first, *rest = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"en": first.strip()}
    for line in rest:
        language, separator, text = line.partition(".utf8=")
        if separator and text.strip():
            found[language] = text.strip()
    return {language: found[language] for language in LANGUAGES if found.get(language)}


def stamps(root: pathlib.Path) -> Iterator[dict[str, str]]:
    """Key, image, caption and sound (or none) of each stamp and language."""
    for image in sorted(root.rglob("*.png")):
        text = image.with_suffix(".txt")
        if not text.is_file():
            continue
        for language, caption in captions(text).items():
            ending = "_desc.ogg" if language == "en" else f"_desc_{language}.ogg"
            sound = image.with_name(image.stem + ending)
            key = image.relative_to(root).with_suffix("").as_posix()
            line = {"key": key, "image": str(image.resolve()), "text": caption}
            yield line | ({"audio": str(sound.resolve())} if sound.is_file() else {})


def write_lines(path: pathlib.Path, lines: list[dict[str, str]]) -> None:
    """Writes JSON lines, unless they are there: a file that has not changed lets an interrupted preparation go on."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(lines)} records")


def main() -> None:
    """Lists the corpus and prepares its four stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("data/tuxpaint"))
    parser.add_argument("--stamps", type=pathlib.Path, default=pathlib.Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--python-doc", type=pathlib.Path, default=pathlib.Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--workers", type=int, help="processes (default: one a CPU core)")
    arguments = parser.parse_args()
    for path, package in ((arguments.stamps, "tuxpaint-stamps-default"), (arguments.python_doc, "python3.11-doc")):
        if not path.is_dir():
            sys.exit(f"{path}: not there; `apt-get install {package}`, or unpack it and name the folder (--help)")
    source = arguments.out / "source"
    source.mkdir(parents=True, exist_ok=True)
    everything = list(stamps(arguments.stamps))
    spoken = [line for line in everything if "audio" in line]
    write_lines(source / "images.jsonl", [{name: line[name] for name in ("key", "image", "text")} for line in everything])
    write_lines(source / "speech.jsonl", [{name: line[name] for name in ("key", "audio", "text")} for line in spoken])
    write_lines(source / "trios.jsonl", spoken)
    inputs = {"image": "images.jsonl", "audio": "speech.jsonl", "trio": "trios.jsonl"}
    for name in ("text", *inputs):
        path = source / inputs[name] if name in inputs else f"{arguments.python_doc}/**/*.rst.txt"
        words = ["data", "prepare", str(SPECS / f"tuxpaint_{name}.yaml"), "--set", f"output={arguments.out / name}"]
        words += ["--set", f"inputs.0.path={path}"]
        words += ["--workers", str(arguments.workers)] if arguments.workers else []
        print(f"v4train {' '.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "v4train.cli.main", *words]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
