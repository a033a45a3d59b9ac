"""The report says what the results files say, and every link, name and citation of the documents resolves."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from gdro_core import allocation_marginals
from simulations import harness

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "paper"
FILL = runpy.run_path(str(PAPER / "fill.py"))
filled, NUMBER, TABLE = FILL["filled"], FILL["NUMBER"], FILL["TABLE"]
REPORT = (PAPER / "README.md").read_text(encoding="utf-8")
CLAIMS = (PAPER / "claims.md").read_text(encoding="utf-8")
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (PAPER / "results").glob("*.json")}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build", "dist") for part in path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    """Fences and code spans hold no links and no mathematics of the text."""
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a Markdown text in `folder` whose file, or whose anchor, does not exist."""
    broken = []
    for link in LINK.findall(without_code(text)):
        name, _, anchor = link.partition("#")
        path = folder / name
        if re.match(r"[a-z]+:", link):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8") if name else text)):
            broken.append(link)
    return broken


def defined(path: Path) -> set[str]:
    """Functions and classes at the top of a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_are_those_of_the_results_files(path):
    """`make paper` would change nothing."""
    text = path.read_text(encoding="utf-8")
    assert filled(text, path.parent) == text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path):
    """Files exist, and headings for anchors."""
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_a_dead_link_or_anchor_is_found():
    """What the test above would miss, it would miss for ever."""
    text = "# A head: $x$\n[a](#a-head-x) [b](fill.py) [c](proofs.md#joint-play) `[d](none)` [w](https://none)"
    assert broken_links(text, PAPER) == []
    assert broken_links("[a](#a) [b](fil.py) [c](proofs.md#joint)", PAPER) == ["#a", "fil.py", "proofs.md#joint"]


@pytest.fixture
def folder(tmp_path):
    """A results file with a verdict, nested numbers and a claim that fails."""
    content = {
        "verdict": "a: slope -0.52 [-0.53, -0.51]; b: slope 1e-09, 23% of x",
        "gain": [{"mean": 1234.5}],
        "ok": False,
    }
    (tmp_path / "r.json").write_text(json.dumps(content))
    (tmp_path / "t.md").write_text("## A\n| uniform | 1.5 (-0.25 [-0.5, 0.0]) |")
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("7<!-- r.json verdict/a: slope -->", "−0.52 [−0.53, −0.51]"),
        ("7 [1, 2]<!-- r.json verdict/a: slope as +.1f*10 -->", "−5.2 [−5.3, −5.1]"),
        ("**7<!-- r.json verdict/a: … slope as .1f -->**", "−0.5 [−0.5, −0.5]"),
        ("−7e−3<!-- r.json verdict/b: slope -->", "1e−09"),
        ("7<!-- r.json verdict/b: … , -->", "23%"),
        ("7<!-- r.json verdict/b: … , as .2f -->", "0.23"),
        ("1,000<!-- r.json gain/0/mean as ,.0f -->", "1,234"),
        ("7<!-- r.json gain/0/mean -->", "1234.5"),
        ("yes<!-- r.json ok -->", "no"),
        ("7<!-- t.md ## A … uniform … ( -->", "−0.25 [−0.5, 0.0]"),
    ],
)
def test_a_number_is_rewritten(folder, before, after):
    """From paths and phrases, with formats; once more changes nothing."""
    text = filled(before, folder)
    assert re.sub(r"<!--.*?-->|\*", "", text) == after
    assert filled(text, folder) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7<!-- s.json gain -->", "s.json does not exist"),
        ("7<!-- r.json loss -->", "no key 'loss'"),
        ("7<!-- r.json gain/1/mean -->", "no key '1'"),
        ("7<!-- r.json gain -->", "no number at"),
        ("7<!-- r.json verdict -->", "no number at"),
        ("7<!-- r.json verdict/c: slope -->", "'c: slope' stands 0 times"),
        ("7<!-- r.json verdict/slope -->", "'slope' stands 2 times"),
        ("7<!-- r.json verdict/a: … b … c -->", "'c' does not stand where"),
        ("7<!-- r.json verdict/a: … b -->", "no number follows"),
        ("seven<!-- r.json ok -->", "no number stands before"),
        ("7 <!-- r.json ok -->", "no number stands before"),
    ],
)
def test_a_wrong_source_is_refused(folder, text, message):
    """Missing files, keys and phrases, and comments without a number."""
    with pytest.raises(ValueError, match=re.escape(message)):
        filled(text, folder)


@pytest.fixture
def compared(tmp_path):
    """Two results files with rows; the second has one of them."""
    base = {"mean": 70.62, "median": 1.0}
    joint = {"mean": 79.7, "difference": 9.06, "low": -3.95, "high": 14.36}
    (tmp_path / "a.json").write_text(json.dumps({"methods": {"grpo": {"p 8": base}, "joint+x=1": {"p 8": joint}}}))
    (tmp_path / "b.json").write_text(json.dumps({"joint+x=1": {"SNR": {"value": 0.07, "low": 0.01, "high": 0.1}}}))
    return tmp_path


ROWS = "| | p | q |\n|---|---|---|\n| GRPO<!-- grpo --> | 1 | 2 |\n| [j](k)<!-- joint+x=1 --> | |\n"


def test_a_table_is_filled(compared):
    """Differences with their interval, means without a sign, a column's own format, an empty cell for a missing row."""
    head = "<!-- table +.1f\na.json methods/*/p 8\nb.json */SNR as .2f -->\n"
    text = filled(f"text\n\n{head}{ROWS}\nmore", compared)
    rows = ROWS.replace("| 1 | 2 |", "| 70.6 |  |").replace("| |\n", "| +9.1 [−4.0, +14.4] | 0.07 [0.01, 0.10] |\n")
    assert text == f"text\n\n{head}{rows}\nmore"
    assert filled(text, compared) == text


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("a.json", "c.json", "c.json does not exist"),
        ("/p 8", "/p 9", "no key 'p 9'"),
        ("/*/p 8", "/*", "no number at a.json methods/* of 'grpo'"),
        ("/*/", "/grpo/", "no FILE KEY as FORMAT, with a * in KEY"),
        (" -->\n| |", " -->\n\n| |", "no table stands behind"),
        ("<!-- grpo -->", "", "no name stands in a comment in the first cell"),
        ("<!-- grpo -->", "<!-- gpro -->", "no file has 'gpro'"),
    ],
)
def test_a_wrong_table_is_refused(compared, before, after, message):
    """Missing files, keys, stars, and rows that nobody knows."""
    text = f"<!-- table +.1f\na.json methods/*/p 8 -->\n{ROWS}"
    assert before in text
    with pytest.raises(ValueError, match=re.escape(message)):
        filled(text.replace(before, after), compared)


def test_speeds_are_collected_without_what_tells_of_the_machine(tmp_path, monkeypatch):
    """Medians and notes of the benchmarks, and the last line of what TRL's run printed."""
    (tmp_path / "results" / "training").mkdir(parents=True)
    monkeypatch.setitem(FILL["collect"].__globals__, "HERE", tmp_path)
    row = {"name": "step[1]", "stats": {"median": 0.5, "mean": 9.0}, "extra_info": {"threads": 1}}
    (tmp_path / "bench.json").write_text(json.dumps({"machine_info": {"node": "secret"}, "benchmarks": [row]}))
    (tmp_path / "trl-2.json").write_text("{'train_loss': 1}\n" + json.dumps({"step_s": 0.8}) + "\n")
    FILL["collect"](tmp_path)
    saved = json.loads((tmp_path / "results" / "training" / "speed.json").read_text())
    assert saved == {"step[1]": {"median_s": 0.5, "threads": 1}, "trl-2": {"step_s": 0.8}}


def test_every_interval_has_a_source():
    """A measured number of the report does not stand there by hand."""
    bare = re.findall(rf"{NUMBER} \[{NUMBER}, {NUMBER}\](?!<!--)", TABLE.sub("", without_code(REPORT)))
    assert bare == []


@pytest.mark.parametrize("name", harness.names())
def test_results_are_of_the_present_claims_at_full_size(name):
    """Claim, source, columns and seeds are those of the code."""
    module, result = harness.load(name), RESULTS[name]
    assert (result["claim"], result["source"], result["columns"]) == (module.CLAIM, module.SOURCE, module.COLUMNS)
    assert (result["seeds"], result["quick"]) == (module.SEEDS, False)


def test_the_count_of_failed_claims_is_right():
    """Those that fail are named in the report, and counted."""
    simulated = {name: result["holds"] for name, result in RESULTS.items() if name in harness.names()}
    failed = {name for name, holds in simulated.items() if not holds}
    assert f"{len(failed)} of {len(simulated)} claims" in REPORT
    assert set(re.findall(r"\(`(\w+)`\) \| holds: no<", REPORT)) == failed


def test_claims_name_code_that_exists():
    """Each `name` behind a Python file of the packages is defined there, and its module imports."""
    links = re.findall(r"\[`(\w+)`\]\(\.\./((?:gdro_core(?:/theory)?|simulations)/\w+)\.py\)", CLAIMS)
    assert len(links) > 40
    assert [(name, module) for name, module in links if name not in defined(ROOT / f"{module}.py")] == []
    assert all(hasattr(importlib.import_module(module.replace("/", ".")), name) for name, module in links)


def test_claims_name_tests_that_exist():
    """Each test is a function of the file behind it."""
    links = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/\S+?\.py)\)", CLAIMS)
    assert len(links) > 60
    assert [(name, file) for name, file in links if name not in defined(ROOT / file)] == []


def test_every_experiment_theorem_and_flaw_is_claimed():
    """The table is complete; rows link what they name."""
    named = re.findall(
        r"\[`(\w+)`\]\(\.\./simulations/experiments/(\w+)\.py\): (?:yes|no)<!-- results/(\w+)\.json", CLAIMS
    )
    assert all(len(set(names)) == 1 for names in named)
    assert {names[0] for names in named} == set(harness.names())
    proved = re.findall(r"\[([TF]\d+)\]\(proofs\.md#([tf]\d+)-", CLAIMS)
    assert all(name.lower() == anchor for name, anchor in proved)
    assert {name for name, _ in proved} == {f"T{k}" for k in range(1, 23)} | {f"F{k}" for k in range(1, 11)}


@pytest.mark.parametrize("name", ["README.md", "proofs.md", "claims.md"])
def test_mathematics_renders_on_github(name):
    """Inline formulas end on their line and hold nothing that Markdown takes first; none stands in a heading."""
    text = re.sub(r"<!--.*?-->", "", without_code((PAPER / name).read_text(encoding="utf-8")))
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line
        assert not (line.startswith("#") and "$" in line), line
        for formula in line.split("$")[1::2]:
            assert not re.search(r"\\[^A-Za-z]|[*<|]|\]\(|^\s|\s$|operatorname", formula), line


def test_the_examples_of_f5():
    """Mean counts under the uniform law over feasible allocations, as the text quotes them."""
    text = (PAPER / "proofs.md").read_text(encoding="utf-8")
    for sizes in ([5, 5, 5, 5, 80], [1, 20, 20, 20, 39]):
        law = allocation_marginals(np.zeros((5, 11)), sizes, 4 * sum(sizes), min_rollouts=2)
        small, *_, large = law @ np.arange(2, 13)
        if sizes[0] == 5:
            assert f"{small:.2f} for the small ones and {large:.2f} for the large one" in " ".join(text.split())
        else:
            assert small == pytest.approx(large)


def test_seeds_that_joint_play_does_not_win_are_seeds_where_grpo_is_good():
    """Three of the 24 where little transfers, and GRPO is in the better half of its own eight there."""
    ranks = []
    for size in ("0.9M", "3M", "12M"):
        with (PAPER / "results" / "training" / f"compare-cells-{size}.csv").open(newline="") as file:
            rates = {(row["method"], row["seed"]): float(row["pass@8"]) for row in csv.DictReader(file)}
        grpo, joint = ([rates[name, str(seed)] for seed in range(8)] for name in ("grpo", "joint"))
        ranks += [
            sum(other > mine for other in grpo) for mine, gained in zip(grpo, joint, strict=True) if gained <= mine
        ]
    assert "In the three seeds\n  that it does not win, GRPO's result is in the better half" in REPORT
    assert len(ranks) == 3
    assert max(ranks) < 4


def test_figures_are_shown_and_small():
    """Every picture in figures/ is in the report, below 100 kB."""
    shown = set(re.findall(r"\(figures/([\w.-]+\.png)\)", REPORT))
    sizes = {path.name: path.stat().st_size for path in (PAPER / "figures").iterdir()}
    assert set(sizes) == shown
    assert max(sizes.values()) < 100_000


def test_citation_has_what_the_format_demands():
    """CFF 1.2.0: mandatory fields, the present version and licence, and the paper's five authors."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[field] for field in ("message", "title", "authors"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    paper = citation["references"][0]
    assert {author["family-names"] for author in paper["authors"]} == {"Panaganti", "Liang", "Yu", "Mi"}
    assert paper["url"].endswith("/2601.19280")
    assert all(
        reference["type"] and reference["title"] and reference["authors"] for reference in citation["references"]
    )
