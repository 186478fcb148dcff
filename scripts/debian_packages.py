"""Write Debian's package descriptions as a catalogue and pairs for ``omni start``.

apt fetches the lists into a folder of their own; nothing of the machine's apt changes. Entities are
packages: name, English title, English description, section. A pair's query is the title of a
package in another language. The descriptions and their translations belong to their authors: use
them, do not pass them on with this project.

    python scripts/debian_packages.py --out packages --languages de,fr,es,ja
    omni start --catalogue packages/packages.jsonl --pairs packages/translations.jsonl \
        --entity-type package --out search
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

LANGUAGES = "cs,da,de,es,fi,fr,hu,it,ja,ko,nl,pl,pt,pt_BR,ru,sk,sv,tr,uk,vi,zh_CN,zh_TW"
CAT = "/usr/lib/apt/apt-helper"


def fetch(folder: Path, languages: list[str]) -> list[Path]:
    """Let apt fetch packages and descriptions; return the files of both."""
    state, cache = folder / "state", folder / "cache"
    for made in (state / "lists" / "partial", cache / "archives" / "partial"):
        made.mkdir(parents=True, exist_ok=True)
    wanted = " ".join(f'"{language}";' for language in ("en", *languages))
    settings = folder / "apt.conf"
    settings.write_text(  # images of containers say "none", which only a file can take back
        f'#clear Acquire::Languages;\nAcquire::Languages {{ {wanted} }};\nAPT::Sandbox::User "";\n'
        f'Dir::State "{state.resolve()}";\nDir::Cache "{cache.resolve()}";\n',
        encoding="utf-8",
    )
    subprocess.run(["apt-get", "-c", str(settings), "-qq", "update"], check=True)
    lists = state / "lists"
    files = sorted(lists.glob("*_Packages*")) + sorted(lists.glob("*_Translation-*"))
    if not any("Translation-en" in file.name for file in files):
        raise SystemExit(
            f"{lists} holds no Translation-en: does this machine's apt mirror have it?"
        )
    return files


def stanzas(file: Path) -> Iterator[dict[str, str]]:
    """Yield the entries of an apt list, packed or not."""
    done = subprocess.run([CAT, "cat-file", str(file)], check=True, capture_output=True)
    for block in done.stdout.decode("utf-8", "replace").split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.split("\n"):
            if line.startswith(" ") and name:
                fields[name] += "\n" + line[1:]
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def prose(description: str) -> tuple[str, str]:
    """Split a description into its title and its text, without the marks of paragraphs."""
    title, _, text = description.partition("\n")
    return title, " ".join(line.strip() for line in text.split("\n") if line.strip() != ".")


def main() -> None:
    """Fetch, join by the descriptions' digests, and write two files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--languages", default=LANGUAGES, help="of the queries")
    parser.add_argument("--most", type=int, default=0, help="packages at most; 0: all")
    arguments = parser.parse_args()
    files = fetch(arguments.out / "apt", arguments.languages.split(","))
    sections = {
        entry["Package"]: entry.get("Section", "")
        for file in files
        if "_Packages" in file.name
        for entry in stanzas(file)
        if "Package" in entry
    }
    packages: dict[str, dict[str, str]] = {}
    digests: dict[str, set[str]] = {}
    translations: dict[tuple[str, str, str], None] = {}
    for file in (file for file in files if "_Translation-" in file.name):
        language = file.name.rpartition("_Translation-")[2].partition(".")[0]
        for entry in stanzas(file):
            name, digest = entry.get("Package", ""), entry.get("Description-md5", "")
            title, text = prose(entry.get(f"Description-{language}", ""))
            if not title or name not in sections:
                continue
            if language == "en":
                packages[name] = {"name": name, "headline": title, "body": text}
                digests.setdefault(name, set()).add(digest)
            else:
                translations[name, language, title] = None
    chosen = sorted(packages)
    if arguments.most:
        translated = {name for name, _, _ in translations}
        chosen = sorted(chosen, key=lambda name: name not in translated)[: arguments.most]
    with (arguments.out / "packages.jsonl").open("w", encoding="utf-8") as out:
        for name in chosen:
            row = {"sku": name, **packages[name], "department": sections[name]}
            row["headline"] = f"{name}: {row['headline']}"
            del row["name"]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    kept = set(chosen)
    pairs = [key for key in translations if key[0] in kept]
    with (arguments.out / "translations.jsonl").open("w", encoding="utf-8") as out:
        for name, language, title in pairs:
            row = {"search_term": title, "locale": language, "sku": name}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(chosen):,} packages, {len(pairs):,} translated titles in {arguments.out}")


if __name__ == "__main__":
    main()
