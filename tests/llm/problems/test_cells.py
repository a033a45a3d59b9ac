"""The testbed: problems are right, splits are disjoint, pass rates are exact, and the shipped warm start has a tail."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gdro_llm.config import Config  # noqa: E402
from gdro_llm.engine.policy import load_policy, success_probability  # noqa: E402
from gdro_llm.problems import cells  # noqa: E402
from gdro_llm.training import warm_start  # noqa: E402

TOKENIZER = cells.character_tokenizer()
CHARACTERS = "".join(token for token in TOKENIZER.get_vocab() if len(token) == 1)
SPLITS = ("train", "validation", "test")


def evaluate(question: str) -> str:
    """The right answer, from the text of the question alone."""
    marker, digits = question[0], question[1:]
    if marker == "M":
        return str(max(int(x) for x in digits.split(",")))
    if marker in "srd":
        return {"s": "".join(sorted(digits)), "r": digits[::-1], "d": str(sum(map(int, digits)))}[marker]
    assert re.fullmatch(r"[0-9+*/%-]+", question)
    return str(eval(question.replace("/", "//")))


@pytest.fixture(scope="module")
def problems():
    return {split: cells.cell_problems(split, dict.fromkeys(cells.LEVELS, 40), seed=0) for split in SPLITS}


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)  # so small a model is not faster with more, and far slower on a busy machine
    return load_policy(Config(dtype="float32"))


def exact(policy, problems):
    prompts = [policy.tokenizer.encode(p.prompt, add_special_tokens=False) for p in problems]
    accepted = [p.accepted for p in problems]
    return success_probability(policy, prompts, accepted, max_new_tokens=14, temperature=1.0, rows=512)


@pytest.mark.parametrize("split", SPLITS)
def test_every_accepted_completion_ends_in_the_independently_evaluated_answer(problems, split):
    for problem in problems[split]:
        answer = evaluate(problem.prompt.removesuffix("="))
        assert problem.answer == answer
        assert problem.accepted[0] == answer
        for scratch in problem.accepted[1:]:
            assert scratch[0] in cells.STRATEGIES
            assert scratch.rpartition("=")[2] == answer


@pytest.mark.parametrize(
    ("name", "numbers", "question", "scratch"),
    [
        ("add2", [86, 35], "86+35", "121=121"),
        ("sub3", [301, 730], "730-301", "924=429"),
        ("mul2", [45, 4], "45*4", "081=180"),
        ("sum4", [9, 7, 8, 6], "9+7+8+6", "1624=30"),
        ("dsum3", [2, 3, 4], "d234", "05=9"),
        ("mod2", [101, 7], "101%7", "13=3"),  # 1; 10 = 7 + 3; 31 = 28 + 3
        ("div2", [506, 4], "506/4", "112262=126"),  # 5 = 1*4 + 1; 10 = 2*4 + 2; 26 = 6*4 + 2
        ("mix1", [3, 6, 6], "3*6+6", "18=24"),
    ],
)
def test_scratch_work_is_the_hand_checked_one(name, numbers, question, scratch):
    class Scripted:
        def randint(self, low, high):
            assert low <= numbers[0] <= high
            return numbers.pop(0)

    drawn = next(cell for cell in cells.CELLS if cell.name == name).draw(Scripted())
    assert (drawn[0], drawn[2]) == (question, scratch)


def test_splits_are_disjoint_and_ids_unique_whatever_the_seeds(problems):
    by_split = {
        split: {p.id for s in range(3) for p in cells.cell_problems(split, {"easy": 60, "middle": 60, "hard": 60}, s)}
        for split in SPLITS
    }
    assert not by_split["train"] & by_split["test"]
    assert not by_split["train"] & by_split["validation"]
    assert not by_split["validation"] & by_split["test"]
    for of_split in problems.values():
        assert max(Counter(p.id for p in of_split).values()) == 1
        assert max(Counter(p.prompt for p in of_split).values()) == 1  # a question belongs to one cell


def test_every_cell_gives_what_its_level_asks():
    train = cells.cell_problems("train", {"easy": 100, "middle": 60, "hard": 25}, seed=7)
    assert Counter(p.task for p in train) == {
        c.name: {"easy": 100, "middle": 60, "hard": 25}[c.level] for c in cells.CELLS
    }
    assert len(cells.CELLS) == 25


def test_problems_are_deterministic_and_a_larger_request_extends_a_smaller_one(problems):
    again = cells.cell_problems("test", dict.fromkeys(cells.LEVELS, 40), seed=0)
    assert again == problems["test"]
    assert again != cells.cell_problems("test", dict.fromkeys(cells.LEVELS, 40), seed=1)
    hard = cells.cell_problems("test", {"hard": 10}, seed=0)
    assert hard == [p for c in cells.CELLS if c.level == "hard" for p in [q for q in again if q.task == c.name][:10]]


def test_warm_start_never_sees_a_problem_of_another_split():
    rng = random.Random(0)
    for cell in cells.CELLS:
        for _ in range(100):
            prompt, _ = cells.warm_start_example(rng, cell)
            assert cells.split_of(prompt[:-1]) == "train"


@pytest.mark.parametrize("cell", [c for c in cells.CELLS if c.strategy], ids=lambda cell: cell.name)
def test_warm_start_forces_half_and_uses_the_strategy_as_rarely_as_its_prior(cell):
    rng = random.Random(0)
    examples = [cells.warm_start_example(rng, cell) for _ in range(4000)]
    free = [completion for prompt, completion in examples if prompt.endswith(cells.ANSWER)]
    right_strategy = sum(completion.startswith(cell.strategy) for completion in free) / len(free)
    # 3.8 and about 4 sigma: 2e-4 if the seed were new
    assert len(free) / len(examples) == pytest.approx(0.5, abs=0.03)
    assert right_strategy == pytest.approx(cell.scratch_prior, abs=4 * (cell.scratch_prior / len(free)) ** 0.5)
    for prompt, completion in examples:
        if prompt.endswith(cells.FORCE):
            assert completion.startswith(cell.strategy)
            assert completion.rpartition("=")[2] == evaluate(prompt[:-1])


@pytest.mark.parametrize(
    ("split", "per_level", "named"),
    [("dev", {"easy": 1}, "split"), ("test", {"trivial": 1}, "per_level"), ("test", {"middle": 200}, "per_level")],
)
def test_bad_requests_name_the_argument(split, per_level, named):
    with pytest.raises(ValueError, match=named):
        cells.cell_problems(split, per_level, seed=0)


@given(st.text(alphabet=CHARACTERS))
def test_tokenizer_round_trip_is_exact_with_one_token_a_character(text):
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


@given(st.characters(exclude_characters=CHARACTERS))
def test_tokenizer_refuses_a_character_it_does_not_know(character):
    with pytest.raises(Exception, match="WordLevel"):
        TOKENIZER(character)


def test_tokenizer_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == (cells.PAD, cells.EOS, "left")
    batch = loaded(["12+3=", "M34,11="], padding=True)
    assert batch.attention_mask == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    assert loaded.batch_decode(batch.input_ids, skip_special_tokens=True) == ["12+3=", "M34,11="]


def test_everything_fits_the_vocabulary_and_the_stated_lengths(problems):
    for problem in [problem for of_split in problems.values() for problem in of_split]:
        assert len(TOKENIZER(problem.prompt).input_ids) <= cells.MAX_PROMPT_LENGTH
        for completion in problem.accepted:
            assert len(TOKENIZER(completion).input_ids) + 1 <= cells.MAX_COMPLETION_LENGTH


def test_shared_cells_are_the_same_problems_with_one_strategy():
    """What is learnt on one cell helps on every other; only the traps (cells without a strategy) have none."""
    own, shared = cells.TESTBEDS["cells"], cells.TESTBEDS["cells-shared"]
    assert {cell.strategy for cell in shared} - {None} == {cells.STRATEGIES[0]}
    assert len({cell.strategy for cell in own} - {None}) > 1
    for one, other in zip(own, shared, strict=True):
        assert replace(other, strategy=one.strategy) == one
        assert (other.strategy is None) == (one.strategy is None)
    for split in SPLITS:
        sets = [cells.cell_problems(split, dict.fromkeys(cells.LEVELS, 3), 8, testbed) for testbed in (own, shared)]
        assert [(p.id, p.prompt, p.answer) for p in sets[1]] == [(p.id, p.prompt, p.answer) for p in sets[0]]
    hard = [p for p in sets[1] if p.level == "hard"]
    assert all(cells.STRATEGIES[0] in text for p in hard for text in p.accepted if text != p.answer)


@pytest.mark.parametrize(("size", "millions"), [("0.9M", 0.857), ("3M", 3.42), ("12M", 11.5)])
def test_sizes_have_the_stated_number_of_parameters(size, millions):
    """And learn: a forward pass gives finite logits of the whole vocabulary."""
    model = warm_start.tiny_qwen3(TOKENIZER, 0, warm_start.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, len(TOKENIZER))
    assert logits.isfinite().all()


def test_a_warm_start_of_another_testbed_differs(tmp_path, monkeypatch):
    """The same seed, other examples."""
    monkeypatch.setattr(warm_start, "level_table", lambda policy, problems: "")  # of a thousand problems
    for testbed in cells.TESTBEDS:
        warm_start.warm_start(tmp_path / testbed, 1, testbed=testbed, steps=2, fine_tune_steps=1, batch=16)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in cells.TESTBEDS)
    assert one != other


@pytest.mark.slow
def test_warm_start_depends_on_the_seed_alone_and_replaces_its_folder(tmp_path, capsys):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        warm_start.warm_start(tmp_path / name, seed, steps=2, fine_tune_steps=1, batch=4)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        printed = re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE)
        assert printed == ["level", *cells.LEVELS, "all"]
    assert weights[0] == weights[1] != weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["steps", "fine_tune_steps", "batch"])
def test_warm_start_refuses_empty_training(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        warm_start.warm_start(tmp_path, **{name: 0})


def test_shipped_tokenizer_is_the_one_in_the_code(shipped):
    assert shipped.tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_shipped_warm_start_has_the_stated_heavy_tail(shipped, problems):
    """Easy cells mostly solved, middle ones sometimes, hard ones almost never, although the skill is there."""
    test = problems["test"]
    rates = exact(shipped, test)
    mean = {level: rates[[p.level == level for p in test]].mean().item() for level in cells.LEVELS}
    assert 0.60 < mean["easy"] < 0.85
    assert 0.15 < mean["middle"] < 0.50
    assert 0.005 < mean["hard"] < 0.05
    hard = [p for p in test if p.level == "hard"]
    forced = [replace(p, prompt=p.prompt[:-1] + cells.FORCE, accepted=p.accepted[1:]) for p in hard]
    assert exact(shipped, forced).mean() > 0.6


def test_exact_pass_rates_agree_with_sampled_ones(shipped, problems):
    """transformers' own `generate`, from left-padded prompts, succeeds as often as teacher forcing says."""
    model, tokenizer = shipped.model, shipped.tokenizer
    some = problems["test"][::100]
    rates = exact(shipped, some)
    torch.manual_seed(0)
    inputs = tokenizer([p.prompt for p in some], padding=True, return_tensors="pt")
    samples, prompt_length = 200, inputs.input_ids.shape[1]
    with torch.no_grad():
        tokens = model.generate(
            **inputs, do_sample=True, max_new_tokens=cells.MAX_COMPLETION_LENGTH, num_return_sequences=samples
        )
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    hits = torch.tensor([text in some[i // samples].accepted for i, text in enumerate(texts)], dtype=torch.double)
    sampled = hits.view(len(some), samples).mean(1)
    spread = (rates * (1 - rates) / samples).sqrt() + 1 / samples
    assert ((sampled - rates).abs() < 4 * spread).all()
    assert sampled.mean() == pytest.approx(rates.mean().item(), abs=0.03)


def test_logits_do_not_depend_on_left_padding(shipped):
    model, tokenizer = shipped.model, shipped.tokenizer
    plain = tokenizer("12+3=", return_tensors="pt")
    padded = tokenizer(["12+3=", "1+2+3+4+5="], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = model(**plain).logits[0, -1]
        together = model(**padded).logits[0, -1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
