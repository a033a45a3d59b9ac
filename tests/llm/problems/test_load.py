"""Problems by name and by file, their ids and flaws, and the order of batches."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_llm.config import Config, UsageError
from gdro_llm.problems.ladder import LADDER, PER_TASK, ladder_problems
from gdro_llm.problems.load import batch_indices, load_problems, read_jsonl, read_set, read_sets
from gdro_llm.problems.public import KNOWN, read_hub


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path):
    """An id is the file's own or made from the text: shuffled rows keep their ids."""
    rows = [{"problem": f"What is {i}?", "answer": i} for i in range(20)]
    rows[3]["id"] = "mine/3"
    before = {p.prompt: p for p in read_jsonl(write(tmp_path / "d.jsonl", rows))}
    random.Random(0).shuffle(rows)
    after = {p.prompt: p for p in read_jsonl(write(tmp_path / "d.jsonl", rows))}
    assert before == after
    assert len({p.id for p in before.values()}) == 20
    assert before["What is 3?"].id == "mine/3"


def test_a_row_becomes_a_problem(tmp_path):
    """Answer as text, task and level; an answer 0 is an answer; braces and line separators in a text stay."""
    text = "Let {problem} = {x}\u2028and \x85 so"
    rows = [
        {"problem": text, "answer": 0, "level": 2, "subject": "Algebra"},
        {"problem": "b", "answer": " \\frac{1}{2} ", "source": "s", "id": "b"},
        {"problem": "c", "answer": "None"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    a, b, c = read_jsonl(path)
    assert (a.prompt, a.answer, a.task, a.level) == (text, "0", "Algebra", "2")
    assert (b.id, b.answer, b.task, b.level) == ("b", "\\frac{1}{2}", "s", "")
    assert (c.answer, c.task) == ("None", "d")


@given(st.integers(1, 200), st.data())
def test_batches_repeat_nothing_within_an_epoch(size, data):
    """Every epoch is a permutation cut into full batches; other epochs and seeds are other permutations."""
    batch_size = data.draw(st.integers(1, size))
    seed, epoch = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 5))
    per_epoch = size // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    rows = np.concatenate([batch_indices(size, batch_size, step, seed) for step in steps])
    assert len(set(rows.tolist())) == len(rows) == per_epoch * batch_size
    assert set(rows.tolist()) <= set(range(size))
    if size >= 50:
        whole = [batch_indices(size, size, e, s).tolist() for e, s in ((0, seed), (1, seed), (0, seed + 1))]
        assert whole[0] != whole[1]
        assert whole[0] != whole[2]
    again = batch_indices(size, batch_size, steps[-1], seed)
    assert again.tolist() == rows[-batch_size:].tolist()


def test_the_remainder_of_an_epoch_is_not_always_the_same():
    """Over some epochs every problem is drawn."""
    seen = {int(i) for step in range(40) for i in batch_indices(10, 4, step, seed=0)}
    assert seen == set(range(10))


@pytest.mark.parametrize("data", ["cells", "ladder"])
def test_embedded_problems_are_distinct_and_disjoint(data):
    """Ids and prompts are unique; no test prompt is a training prompt."""
    train, test = load_problems(Config(data=data, batch_size=8, test_problems=10**6))
    for problems in (train, test):
        assert len({p.id for p in problems}) == len({p.prompt for p in problems}) == len(problems)
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert not {p.id for p in train} & {p.id for p in test}


def test_the_subset_of_test_problems_is_always_the_same():
    """Whatever the seed of the run; it is a part of the whole in its order."""
    whole = load_problems(Config(test_problems=10**6))[1]
    part, again = (load_problems(Config(test_problems=50, seed=seed))[1] for seed in (0, 1))
    assert part == again
    assert len(part) == 50
    order = [whole.index(problem) for problem in part]
    assert order == sorted(order)


def test_answers_of_the_ladder_are_right():
    """Questions and worked examples evaluated by Python; the worked examples are no problems themselves."""

    def value(question: str) -> int:
        if question.startswith("larger of"):
            return max(int(x) for x in question.removeprefix("larger of ").split(" and "))
        return eval(question.removeprefix("copy "), {"__builtins__": {}})

    for split in ("train", "test"):
        problems = ladder_problems(split)
        assert {p.task for p in problems} == LADDER.keys()
        for problem in problems:
            *shots, last = problem.prompt.split("\n\n")
            assert last == f"Q: {problem.id.split('/', 2)[2]}\nA:"
            assert int(problem.answer) == value(last.removeprefix("Q: ").removesuffix("\nA:"))
            assert problem.level == LADDER[problem.task][0]
            for shot in shots:
                question, answer = shot.removeprefix("Q: ").split("\nA: ")
                assert value(question) == int(answer)
                assert f"Q: {question}\n" != last.removesuffix("A:")
        sizes = [sum(p.task == task for p in problems) for task in LADDER]
        assert max(sizes) == PER_TASK[split]
        assert min(sizes) >= 15


QUESTIONS = [{"problem": f"What is {i}?", "answer": str(i), "id": f"q/{i}"} for i in range(6)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "a"}], "line 1: needs an 'answer'"),
        ([{"problem": "a", "answer": " "}], "line 1: needs an 'answer'"),
        ([{"answer": "1"}], "line 1: needs a (JSON object|row) with a text 'problem'"),
        ([QUESTIONS[0], {"problem": "a", "answer": "1", "id": "q/0"}], "line 2: the id 'q/0' occurs twice"),
        ([{"problem": "a", "answer": "1"}] * 2, "line 2: the id 'd/[0-9a-f]{16}' occurs twice"),
        (
            [{"problem": "a b", "answer": "1", "id": "x"}, {"problem": " a\nb", "answer": "2", "id": "y"}],
            "line 2: the text of 'y' also occurs as 'x', with the answer '1' instead of '2'",
        ),
        ([{"problem": "a", "answer": "1", "accepted": "1"}], "line 1: 'accepted' must be a list of texts"),
        ([{"problem": "a", "answer": "1", "accepted": [1]}], "line 1: 'accepted' must be a list of texts"),
        ([{"problem": "a", "answer": "1", "accepted": []}], "line 1: 'accepted' must be a list of texts"),
        ([], "holds no problems"),
    ],
)
def test_flaws_of_a_file_are_errors_that_name_the_place(tmp_path, rows, message):
    """Missing texts and answers, repeated ids, contradictory answers; the same in .parquet, by row."""
    with pytest.raises(UsageError, match=message):
        read_set(str(write(tmp_path / "d.jsonl", rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match=message.replace("line", "row")):
        read_set(str(tmp_path / "d.parquet"))


def test_a_parquet_file_is_read_like_a_jsonl_file(tmp_path):
    """The same problems with the same ids, also without ids of its own; a broken file is refused."""
    rows = [{"problem": f"What is {i}?\u2028", "answer": i, "level": f"{i % 2}", "accepted": None} for i in range(5)]
    rows[2]["accepted"] = [" 2", "two"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read_set(str(tmp_path / "d.parquet")) == read_set(str(write(tmp_path / "d.jsonl", rows)))
    accepted = [problem.accepted for problem in read_set(str(tmp_path / "d.parquet"))]
    assert accepted == [(), (), (" 2", "two"), (), ()]
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match=r"d\.parquet is not a parquet file"):
        read_set(str(tmp_path / "d.parquet"))


def test_several_test_sets_keep_their_names(tmp_path):
    """Each problem's task is its set, so that evaluation reports by benchmark; equal names or ids are refused."""
    one, two = write(tmp_path / "one.jsonl", QUESTIONS[:2]), write(tmp_path / "two.jsonl", QUESTIONS[2:])
    train = write(tmp_path / "train.jsonl", [{"problem": "else", "answer": "1", "subject": "s"}])
    config = Config(data=str(train), test_data=f"{one}, {two},ladder", batch_size=1)
    loaded = load_problems(config)
    assert [p.task for p in loaded[0]] == ["s"]
    tasks = [p.task for p in loaded[1]]
    assert tasks == ["one"] * 2 + ["two"] * 4 + ["ladder"] * (len(tasks) - 6)
    assert {p.id for p in loaded[1]} > {p["id"] for p in QUESTIONS}
    (tmp_path / "else").mkdir()
    for name, message in (("else/one", "'one' twice"), ("else/three", "id 'q/0' occurs in two sets")):
        other = write(tmp_path / f"{name}.jsonl", QUESTIONS[:1])
        with pytest.raises(UsageError, match=message):
            read_sets(f"{one},{other}")


def test_problems_of_a_file_that_occur_in_the_test_file_are_an_error(tmp_path):
    """Blanks aside; with an example."""
    train = write(tmp_path / "train.jsonl", [*QUESTIONS[:3], {"problem": "What  is\n4?", "answer": "4"}])
    test = write(tmp_path / "test.jsonl", QUESTIONS[3:])
    with pytest.raises(UsageError, match=r"1 problems of test_data occur in data too, for example 'What  is\\n4\?'"):
        load_problems(Config(data=str(train), test_data=str(test), batch_size=1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data": "no-such-set", "test_data": "ladder"},
            "no data file or set 'no-such-set': choose cells, .*dapo-math",
        ),
        ({"data": "no.parquet", "test_data": "ladder"}, "no data file or set 'no.parquet'"),
        ({"data": "gsm8k-train"}, "test_data must name held-out problems with data 'gsm8k-train'"),
        ({"data": "ladder", "test_data": "gsm8k"}, "test_data must be empty with data 'ladder'"),
    ],
)
def test_names_that_cannot_be(overrides, message):
    """Refused with the choices."""
    with pytest.raises(UsageError, match=message):
        load_problems(Config(**overrides))


def test_a_hub_out_of_reach_is_one_line_with_the_remedy(tmp_path):
    """Offline and with an empty cache."""
    code = (
        "from gdro_llm.problems.load import *\n"
        "for name in KNOWN:\n"
        "    try: read_set(name)\n"
        "    except UsageError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(KNOWN)
    for line, (name, source) in zip(lines, KNOWN.items(), strict=True):
        assert line.startswith(f"cannot load data set {name!r} ({source.hub}): ")
        assert line.endswith("or give a .jsonl or .parquet file")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a data set folder as the hub has them: one folder a configuration, one parquet file a split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def build(name: str, *parts: list[dict]) -> list:
        source, folder = KNOWN[name], tmp_path / name
        listed = []
        for config, rows in zip(source.configs, parts, strict=False):
            path = folder / (config or "default") / f"{source.split}.parquet"
            path.parent.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
            listed.append((config or "default", path.relative_to(folder)))
        front = "".join(
            f"- config_name: {config}\n  data_files:\n  - split: {source.split}\n    path: {path}\n"
            for config, path in listed
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
        configs = source.configs[: len(parts)]
        return read_hub(name, replace(source, hub=str(folder), configs=configs))

    return build


def test_gsm8k_and_math_answers_are_cut_out_of_their_solutions(hub):
    """After ####, without thousands' commas; in the last box. Subjects and levels become tasks and levels."""
    (one,) = hub("gsm8k", [{"question": "How many?", "answer": "2 #### no\n1,200 + 34 = <<1>>\n#### 1,234"}])
    assert (one.prompt, one.answer, one.task) == ("How many?", "1234", "gsm8k")
    assert one.id.startswith("gsm8k/")
    solution = "First $\\boxed{1}$, then $\\boxed{\\frac{1}{2}}$."
    rows = [{"problem": f"p{i}", "level": "Level 5", "type": "Algebra", "solution": solution} for i in range(2)]
    a, b = hub("math-train", rows[:1], rows[1:])  # two of the seven configurations
    assert [(p.prompt, p.answer, p.task, p.level) for p in (a, b)] == [
        (f"p{i}", "\\frac{1}{2}", "Algebra", "5") for i in range(2)
    ]


def test_several_answers_of_olympiadbench_are_one(hub):
    """Joined by commas; the subfield is the task."""
    rows = [
        {"question": "a", "final_answer": ["$2$"], "subfield": "Algebra"},
        {"question": "b", "final_answer": ["2", "3"], "subfield": "Geometry"},
        {"question": "c", "final_answer": None, "subfield": "Geometry"},
    ]
    assert [(p.answer, p.task) for p in hub("olympiadbench", rows)] == [("$2$", "Algebra"), ("2, 3", "Geometry")]


def test_choices_are_shuffled_by_content(hub):
    """The letter names the right choice, whatever the order of rows; letters are about evenly spread."""
    rows = [
        {
            "Question": f" Which is {i}? ",
            "Correct Answer": f"{i}\n",
            **{f"Incorrect Answer {k}": f"not {i} ({k})" for k in (1, 2, 3)},
            "High-level domain": "Physics",
        }
        for i in range(200)
    ]
    problems = hub("gpqa", rows)
    for i, problem in enumerate(problems):
        lines = problem.prompt.split("\n")
        assert lines[0] == f"Which is {i}?"
        assert [line[:4] for line in lines[2:6]] == ["(A) ", "(B) ", "(C) ", "(D) "]
        assert lines[2 + "ABCD".index(problem.answer)][4:] == str(i)
        assert sorted(line[4:] for line in lines[2:6]) == sorted([str(i), *(f"not {i} ({k})" for k in (1, 2, 3))])
    counts = [sum(p.answer == letter for p in problems) for letter in "ABCD"]
    assert min(counts) > 30
    source = KNOWN["gpqa"]
    again = {p.problem(row): p.answer(row) for p in [source] for row in reversed(rows)}
    assert again == {p.prompt: p.answer for p in problems}


def test_flaws_of_a_public_set_are_left_out_and_counted(hub, capsys):
    """Repetitions, texts with two answers (both) and rows without an answer, one line each."""
    rows = [("a", "1"), ("a ", "1"), ("b", "2"), ("b", "3"), ("b", "2"), ("c", ""), ("d", None), ("e", "5")]
    problems = hub("dapo-math", [{"prompt": p, "solution": s, "ability": "MATH"} for p, s in rows])
    assert [(p.prompt, p.answer) for p in problems] == [("a", "1"), ("e", "5")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("): ")[2] for line in lines] == [
        "2 of 8 rows without an answer left out",
        "3 of 8 rows repeated left out",
        "1 of 8 texts with contradictory answers left out",
    ]


def test_training_problems_of_a_public_set_that_occur_in_a_test_set_are_left_out(hub, tmp_path, monkeypatch, capsys):
    """Counted; the test set stays whole."""
    problems = hub("dapo-math", [{"prompt": f"What is {i}?", "solution": str(i)} for i in range(6)])
    monkeypatch.setattr("gdro_llm.problems.load.read_hub", lambda name, source: problems)
    test = write(tmp_path / "t.jsonl", QUESTIONS[4:])
    train, held_out = load_problems(Config(data="dapo-math", test_data=str(test), batch_size=4))
    assert (train, len(held_out)) == (problems[:4], 2)
    assert "2 of 6 problems that occur in test_data left out" in capsys.readouterr().out


def test_a_public_set_that_changed_is_refused(hub):
    """A missing column is named, with those that are there; so is a set without any answer."""
    with pytest.raises(UsageError, match=r"data set 'dapo-math' .* has no column 'prompt', only text, solution"):
        hub("dapo-math", [{"text": "a", "solution": "1"}])
    with pytest.raises(UsageError, match=r"data set 'gsm8k' .* has no column 'answer', only question"):
        hub("gsm8k", [{"question": "a"}])
    with pytest.raises(UsageError, match=r"'aime25' .* holds no problems with answers"):
        hub("aime25", [{"problem": "a", "answer": ""}])


COLUMNS = {  # set: file of GDRO_DATA_DIR, and a row of the hub made of a row of the file
    "dapo-math": ("dapo_math_en", lambda row: {"prompt": row["problem"], "solution": row["answer"]}),
    "gsm8k": ("gsm8k_test", lambda row: {"question": row["problem"], "answer": f"so\n#### {int(row['answer']):,}"}),
    "gsm8k-train": ("gsm8k_train", lambda row: {"question": row["problem"], "answer": f"#### {row['answer']}"}),
    "math-train": (
        "math_train",
        lambda row: {
            "problem": row["problem"],
            "solution": f"$\\boxed{{{row['answer']}}}$",
            "level": f"Level {row['level']}",
            "type": row["subject"],
        },
    ),
    "math500": ("math500", lambda row: {key: row[key] for key in ("problem", "answer", "level", "subject")}),
    "aime24": ("aime24", lambda row: {"problem": row["problem"], "answer": row["answer"]}),
    "aime25": ("aime25", lambda row: {"problem": row["problem"], "answer": row["answer"]}),
    "amc23": ("amc23", lambda row: {"question": row["problem"], "answer": float(row["answer"])}),
    "minerva": ("minerva_math", lambda row: {"question": row["problem"], "answer": row["answer"]}),
    "olympiadbench": (
        "olympiadbench",
        lambda row: {"question": row["problem"], "final_answer": [row["answer"]], "subfield": row.get("subject")},
    ),
}


@pytest.mark.skipif("GDRO_DATA_DIR" not in os.environ, reason="GDRO_DATA_DIR names no folder of benchmark files")
@pytest.mark.parametrize("name", COLUMNS)
def test_the_columns_of_public_sets_hold_what_the_files_hold(hub, name):
    """A set of the hub's shape, made of a file, gives the problems and answers of that file."""
    file, shape = COLUMNS[name]
    path = Path(os.environ["GDRO_DATA_DIR"]) / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    problems = hub(name, [shape(row) for row in rows])
    first = {}
    for row in rows:
        first.setdefault(" ".join(row["problem"].split()), (row["problem"].strip(), row["answer"].strip()))
    assert [(p.prompt, p.answer) for p in problems] == list(first.values())
    assert len(rows) * 0.99 < len({p.id for p in problems}) == len(problems)
    assert [(p.id, p.answer) for p in read_jsonl(path)] == [(row["id"], row["answer"].strip()) for row in rows]
