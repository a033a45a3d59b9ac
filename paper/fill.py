r"""Numbers in Markdown that come from results files, and the PDF of the report.

A number is followed by an invisible comment that says where it comes from:

    the gap falls with slope −0.522 [−0.531, −0.513]<!-- results/duality_gap.json verdict/full: slope -->
    gains +1.9<!-- results/controllers.json pass/mean as +.1f*100 --> points

FILE is a JSON file (or a Markdown file, which is one text), relative to the file that the number stands in. KEY is a
path of keys (or positions in a list) joined by "/". Where it leads to a text, the rest is a phrase that stands in this
text once, right before the number, which is taken with the interval that follows it, if any; "one … two" is the first
"two" after the only "one". `as FORMAT` is a Python format, with *FACTOR at the end if the unit changes; without it a
number is written as in the file. True and false are written yes and no.

A table's numbers come from the comment before it and from one behind the name of each row:

    <!-- table +.1f
    results/a.json methods/*/pass@8
    results/a.json against/*/mean@8 -->
    | | pass@8 | mean@8 |
    |---|---:|---:|
    | joint play<!-- joint --> | +9.1 [+4.0, +14.4] | +7.3 [+5.2, +9.3] |

Lines of the comment are the columns: a file and a key, where * is the text in the row's comment. A key leads to a
number, or to an object with `value`, `difference`, `mean` or `median` and, for an interval, `low` and `high`. A cell is
empty if the file lacks a key that has *. The format is the table's or, after `as`, a column's own; a mean has no sign.

    python paper/fill.py fill FILE.md ...    rewrite the numbers that differ
    python paper/fill.py collect FOLDER      copy what `python -m simulations`, or `gdro compare` and `gdro signal` (in
                                             folders below), or `make bench` wrote there to results/ and figures/
    python paper/fill.py pdf OUT.pdf         the report and the proofs (needs pypandoc and typst)
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = "---\npapersize: a4\nfontsize: 9.5pt\nmargin: {x: 2.2cm, y: 2cm}\n---"
NUMBER = r"[+\-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+\-−]?\d+)?%?"
VALUE = rf"{NUMBER}(?: \[{NUMBER}, {NUMBER}\])?|yes|no"
SOURCE = r"<!-- (?P<file>\S+\.(?:json|md)) (?P<key>.+?)(?: as (?P<format>\S+))? -->"
SLOT = re.compile(rf"(?P<value>{VALUE}){SOURCE}")
TABLE = re.compile(r"<!-- table (?P<format>\S+)\n(?P<columns>[^>]*?) ?-->\n(?P<rows>(?:\|.*\n)+)")
COLUMN = re.compile(r"(\S+) (\S.*?)(?: as (\S+))?")
ROW = re.compile(r"(?P<label>\|[^|]*<!-- (?P<name>[^|]+?) --> \|).*")


def filled(text: str, folder: Path) -> str:
    """The text with every number as its results file has it.

    Raises:
        ValueError: a comment that names no file, key or phrase, or that follows no number.
    """
    slots = {slot.end() for slot in SLOT.finditer(text)}
    for comment in re.finditer(r"<!-- \S+\.(?:json|md)\b.*?-->", text):
        if comment.end() not in slots:
            raise ValueError(f"no number stands before {comment.group()}, or it is no FILE KEY as FORMAT")
    if len(TABLE.findall(text)) < text.count("<!-- table "):
        raise ValueError("no table stands behind a comment that begins one, or it has no format and columns")
    text = SLOT.sub(lambda slot: written(slot, folder) + slot.group()[len(slot["value"]) :], text)
    return TABLE.sub(lambda table: with_rows(table, folder), text)


def with_rows(table: re.Match[str], folder: Path) -> str:
    """The comment and the table, with the numbers of its rows as the results files have them."""
    columns = []
    for line in table["columns"].splitlines():
        column = COLUMN.fullmatch(line)
        if column is None or "*" not in column[2]:
            raise ValueError(f"a column of a table is no FILE KEY as FORMAT, with a * in KEY: {line!r}")
        columns.append((column[1], column[2], column[3] or table["format"]))
    head, rule, *rows = table["rows"].splitlines()
    done = []
    for row in rows:
        found = ROW.fullmatch(row)
        if found is None:
            raise ValueError(f"no name stands in a comment in the first cell of {row!r}")
        cells = [cell(folder, file, key, found["name"], form) for file, key, form in columns]
        if not any(cells):
            raise ValueError(f"no file has {found['name']!r} of {row!r}")
        done.append(" ".join([found["label"], *(f"{cell} |" for cell in cells)]))
    return table.group()[: -len(table["rows"])] + "\n".join([head, rule, *done]) + "\n"


def cell(folder: Path, file: str, key: str, name: str, form: str) -> str:
    """A number, with its interval if it has one, of a row of a table; empty if the file has no such name."""
    found = json.loads(contents(folder, file, key))
    for part in key.split("/"):
        starred, part = "*" in part, part.replace("*", name)
        if starred and part not in found:
            return ""
        if not isinstance(found, dict) or part not in found:
            raise ValueError(f"no key {part!r} in {file} {key} of {name!r}")
        found = found[part]
    if isinstance(found, dict):
        kind = next((kind for kind in ("value", "difference", "mean", "median") if kind in found), None)
        if kind is None:
            raise ValueError(f"no number at {file} {key} of {name!r}")
        form = form.removeprefix("+") if kind in ("mean", "median") else form
        interval = f" [{found['low']:{form}}, {found['high']:{form}}]" if "low" in found else ""
        return f"{found[kind]:{form}}{interval}".replace("-", "−")
    return f"{found:{form}}".replace("-", "−")


def contents(folder: Path, file: str, place: str) -> str:
    """Of a results file."""
    if not (folder / file).is_file():
        raise ValueError(f"{file} does not exist: {place}")
    return (folder / file).read_text(encoding="utf-8")


def written(slot: re.Match[str], folder: Path) -> str:
    """What the results file says, as it is to be written."""
    content = contents(folder, slot["file"], slot.group())
    value = looked_up(json.loads(content) if slot["file"].endswith("json") else content, slot["key"], slot.group())
    if isinstance(value, bool):
        return "yes" if value else "no"
    spec, _, factor = (slot["format"] or "").partition("*")
    if spec or factor:
        scale = float(factor or 1)
        value = re.sub(NUMBER, lambda number: format(parsed(number.group()) * scale, spec), str(value))
    return str(value).replace("-", "−")


def looked_up(found: Any, key: str, slot: str) -> Any:
    """The value at a path of keys; of a text, the number after the phrase that the rest of the path is."""
    rest = key
    while rest:
        if isinstance(found, str):
            return after_phrase(found, rest, slot)
        name, _, rest = rest.partition("/")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise ValueError(f"no key {name!r} in {slot}")
    if not isinstance(found, bool | int | float):
        raise ValueError(f"no number at {slot}")
    return found


def after_phrase(text: str, phrase: str, slot: str) -> str:
    """The number, with its interval, after a phrase; " … " in it skips to the next place where its next part stands."""
    first, *others = phrase.split(" … ")
    starts = [m.end() for m in re.finditer(re.escape(first) + ("" if others else f"(?= ?(?:{VALUE}))"), text)]
    if len(starts) != 1:
        raise ValueError(f"{first!r} stands {len(starts)} times, not once, in the text of {slot}")
    place = starts[0]
    for part in others:
        start = text.find(part, place)
        place = start + len(part)
        if start < 0:
            raise ValueError(f"{part!r} does not stand where {slot} looks for it")
    number = re.compile(rf" ?({VALUE})").match(text, place)
    if number is None:
        raise ValueError(f"no number follows the phrase of {slot}")
    return number[1]


def parsed(number: str) -> float:
    """The value of a number as people write it."""
    plain = number.replace("−", "-").replace(",", "").removesuffix("%")
    return float(plain) / (100.0 if number.endswith("%") else 1.0)


def fill(files: list[Path]) -> None:
    """Rewrite the numbers of some Markdown files."""
    for file in files:
        before = file.read_text(encoding="utf-8")
        after = filled(before, file.parent)
        changed = sum(a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True))
        print(f"{file}: {changed} lines rewritten")
        if changed:
            file.write_text(after, encoding="utf-8")


def collect(folder: Path) -> None:
    """Copy verdicts, tables and the figures that the report shows."""
    if (folder / "bench.json").is_file():
        return _collect_speed(folder)
    shown = set(re.findall(r"\(figures/([\w.-]+)\.png\)", read("README.md")))
    for path in sorted(folder.glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["quick"]:
            raise ValueError(f"{path} is of a quick run, which is no evidence")
        for suffix in (".json", ".md"):
            if path.with_suffix(suffix).is_file():
                shutil.copyfile(path.with_suffix(suffix), HERE / "results" / f"{path.stem}{suffix}")
        if path.stem in shown:
            _shrink(path.with_suffix(".png"), path.stem)
        print(f"collected {path.stem}")
    for path in sorted(folder.glob("*/comparison.json")):
        name, kept = f"compare-{path.parent.name}", HERE / "results" / "training"
        whole = json.loads(path.read_text(encoding="utf-8"))
        short = {key: value for key, value in whole.items() if key != "runs"}  # comparison.csv has them
        (kept / f"{name}.json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
        for suffix in (".md", ".csv"):
            shutil.copyfile(path.with_suffix(suffix), kept / f"{name}{suffix}")
        if name in shown:
            _shrink(path.with_suffix(".png"), name)
        print(f"collected {name}")
    for path in sorted(folder.glob("*/signal.json")):
        for suffix in (".json", ".md"):
            shutil.copyfile(
                path.with_suffix(suffix), HERE / "results" / "training" / f"signal-{path.parent.name}{suffix}"
            )
        print(f"collected signal-{path.parent.name}")


def _collect_speed(folder: Path) -> None:
    """Medians and what was noted beside them, without what tells of the machine's owner."""
    rows = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["benchmarks"]
    found = {row["name"]: {"median_s": row["stats"]["median"], **row["extra_info"]} for row in rows}
    for path in sorted([*folder.glob("trl-*.json"), *folder.glob("pretrained-*.json")]):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])  # TRL prints lines before
    (HERE / "results" / "training" / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("collected speed")


def _shrink(figure: Path, name: str) -> None:
    """Copy a figure with few colours: they are line art."""
    from PIL import Image  # comes with matplotlib

    with Image.open(figure) as image:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(HERE / "figures" / f"{name}.png", optimize=True)


def pdf(out: Path) -> None:
    """The report and the proofs in one PDF, by pandoc and typst; links between documents become plain text."""
    import pypandoc
    import typst

    text = "\n\n".join([PAGE, *map(read, ("README.md", "proofs.md"))])
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
    source = HERE / ".report.typ"  # beside figures/, which it includes
    source.write_text(
        pypandoc.convert_text(text, "typst", "gfm+yaml_metadata_block", extra_args=["--standalone"]), encoding="utf-8"
    )
    try:
        typst.compile(str(source), output=str(out.resolve()))
    finally:
        source.unlink()
    print(f"wrote {out}")


def read(name: str) -> str:
    """A document of the report."""
    return (HERE / name).read_text(encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for a mistake."""
    commands: dict[str, Callable[[list[Path]], None]] = {
        "fill": fill,
        "collect": lambda paths: collect(paths[0]),
        "pdf": lambda paths: pdf(paths[0]),
    }
    if len(arguments) < 2 or arguments[0] not in commands:
        print(__doc__)
        return 2
    try:
        commands[arguments[0]]([Path(argument) for argument in arguments[1:]])
    except ValueError as error:
        print(f"fill.py: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
