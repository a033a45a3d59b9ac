"""Problems, the order of batches and the graders."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_llm.cells import cell_problems
from gdro_llm.config import Config
from gdro_llm.data import Problem, batch_indices, load_problems, read_jsonl
from gdro_llm.grading import GRADERS
from gdro_llm.ladder import LADDER, PER_TASK, ladder_problems


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
    """Template, answer as text, task and level; an answer 0 is an answer; braces and line separators in a text stay."""
    text = "Let {problem} = {x}\u2028and \x85 so"
    rows = [
        {"problem": text, "answer": 0, "level": 2, "subject": "Algebra"},
        {"problem": "b", "answer": " \\frac{1}{2} ", "source": "s", "id": "b"},
        {"problem": "c", "answer": "None"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    a, b, c = read_jsonl(path, "Q: {problem}\nA:")
    assert (a.prompt, a.answer, a.task, a.level) == (f"Q: {text}\nA:", "0", "Algebra", "2")
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


def test_an_answer_of_a_cell_is_graded_correct_and_its_neighbours_are_not():
    """All accepted completions and only those."""
    for problem in cell_problems("test", {"easy": 5, "middle": 5, "hard": 5}, seed=1):
        for text in problem.accepted:
            assert GRADERS["exact"](problem, text) == 1.0
            for wrong in (text + " ", text[:-1], text + "0", "", text + "<eos>", "?" + text):
                assert GRADERS["exact"](problem, wrong) == 0.0


TABLE = [  # grader, gold answer, right completions, wrong completions
    ("exact", "36", ["36"], ["36 ", " 36", "036", "36.0", "", "336", "3", "36\n"]),
    ("number", "36", ["36", " 36", "36.", "36\n\nQ: 1 + 1", "+36", "36.0", "036"], ["37", "-36", "36 apples", "x\n36"]),
    ("number", "36", [], ["", "\n", "36..", "3,6", "36,", ",36", "36.5", "3 6", "thirty-six", "36+0", "nan", "inf"]),
    ("number", "1234567", ["1234567", "1,234,567", "1,234,567.00"], ["1,23,4567", "1,234", "1 234 567", "12,34567"]),
    ("number", "-5", ["-5", "-5.", " -5.0"], ["5", "- 5", "--5", "−5"]),
    ("number", "0.5", ["0.5", "0.50"], [".5 or so", "1/2", "0,5", "5"]),
    ("number", "9007199254740993", ["9007199254740993"], ["9007199254740992", "9007199254740994"]),
    ("number", "12", ["12"], ["1,2", "١٢", "1e1", "12e0"]),
    ("number", "no number", [], ["no number", "", "0"]),
    (
        "math",
        "\\frac{1}{2}",
        ["\\boxed{0.5}", "\\boxed{\\frac12}", "so $\\frac{2}{4}$"],
        ["\\boxed{2}", "\\boxed{}", ""],
    ),
    ("math", "36", ["The answer is \\boxed{36}", "36", "\\boxed{1}? No. So it is \\boxed{36}."], ["63", "\\boxed{}"]),
    ("math", "36", [], ["\\boxed{36}? No. So it is \\boxed{1}.", "\\boxed{36} or \\boxed{1}", "36. \\boxed{1}"]),
    ("math", "x^2+1", ["\\boxed{1+x^2}"], ["\\boxed{x^2-1}", "\\boxed{x+1}"]),
    ("math", "(3, 4)", ["\\boxed{(3,4)}"], ["\\boxed{(4,3)}", "\\boxed{3}"]),
]


@pytest.mark.parametrize(("grader", "gold", "right", "wrong"), TABLE)
def test_graders(grader, gold, right, wrong):
    """Right completions in their usual dress give 1.0, near misses 0.0, and nothing raises."""
    problem = Problem("id", "prompt", gold)
    found = {text: GRADERS[grader](problem, text) for text in right + wrong}
    assert found == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)
    assert all(type(value) is float for value in found.values())


@pytest.mark.skipif("GDRO_DATA_DIR" not in os.environ, reason="GDRO_DATA_DIR names no folder of benchmark files")
@pytest.mark.parametrize("name", ["gsm8k_test", "math500"])
def test_gold_answers_of_benchmarks_grade_as_correct(name):
    """Grader "math": 50 gold answers in a sentence are right, another problem's answer or an empty box is wrong."""
    problems = read_jsonl(Path(os.environ["GDRO_DATA_DIR"]) / f"{name}.jsonl")
    grade = GRADERS["math"]
    for problem in random.Random(0).sample(problems, 50):
        assert grade(problem, f"We add both sides, so the answer is \\boxed{{{problem.answer}}}.") == 1.0, problem
        for wrong in ("31337", "", "\\text{no}"):
            assert grade(problem, f"We add both sides, so the answer is \\boxed{{{wrong}}}.") == 0.0, problem
