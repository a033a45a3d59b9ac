"""Presets for Qwen3 on DAPO-Math: what their headers promise is computed, and published settings are the paper's."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gdro_core import GDROController, PublishedController
from gdro_llm.cli import main
from gdro_llm.config import PRESETS, Config, load_preset, preset_names
from gdro_llm.engine.memory import check_fits, estimate, summary
from gdro_llm.training.losses import group_advantages
from gdro_llm.training.planners import build_controller

QWEN = [name for name in preset_names() if name.startswith("qwen3-")]
PUBLISHED = [name for name in QWEN if name.endswith("-published")]
RECOMMENDED = [name for name in QWEN if name not in PUBLISHED]


def text_of(name: str) -> str:
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def load(name: str) -> Config:
    return Config(**load_preset(name))


def promise(name: str) -> tuple[str, float, int, str]:
    """Command, GB and GPUs of a preset's header, and the line that the command's verdict must be."""
    match = re.search(r"^# (gdro plan-memory (\S+) --gpu-memory (\d+) --gpus (\d+)):\n#   (.+)$", text_of(name), re.M)
    assert match, f"{name} has no line on memory"
    assert match[2] == name
    return match[1], float(match[3]), int(match[4]), match[5]


def test_there_are_two_forms_of_four_models():
    """`qwen3-SIZE-dapo` is the recommended one."""
    expected = [f"qwen3-{size}-dapo{form}" for size in ("0.6b", "1.7b", "4b", "8b") for form in ("", "-published")]
    assert expected == QWEN
    for name in QWEN:
        size = name.split("-")[1].upper()
        assert load(name).model == f"Qwen/Qwen3-{size}-Base"


@pytest.mark.parametrize("name", QWEN)
def test_the_memory_in_the_header_is_what_the_command_prints(name, capsys):
    """And it fits the GPUs that the header names."""
    command, gigabytes, gpus, line = promise(name)
    assert main(command.split()[1:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"fits: {line}"
    assert summary(estimate(load(name), gigabytes * 1e9, gpus), gpus) == line
    where = f"one {gigabytes:.0f} GB GPU" if gpus == 1 else f"{gpus} GPUs of {gigabytes:.0f} GB"
    assert text_of(name).splitlines()[0].endswith(f"; {where}.")


def test_what_headers_say_of_other_machines_is_true():
    """4B on two GPUs with full moments, 8B by adapters on one; 4B fits one 80 GB GPU in both forms."""
    for name in ("qwen3-4b-dapo", "qwen3-4b-dapo-published"):
        assert promise(name)[1:3] == (80, 1)
    assert check_fits(replace(load("qwen3-4b-dapo"), optimizer="adamw"), 80e9, 2)
    published = replace(load("qwen3-4b-dapo-published"), optimizer="adamw", update_tokens=16384, vllm_memory=0.5)
    assert check_fits(published, 80e9, 2)
    assert check_fits(replace(load("qwen3-8b-dapo"), lora_rank=32, learning_rate=1e-5), 80e9)
    for name, line in (
        ("qwen3-4b-dapo", "on two, add --optimizer adamw."),
        ("qwen3-4b-dapo-published", "--optimizer adamw --update-tokens 16384 --vllm-memory 0.5"),
        ("qwen3-8b-dapo", "add --lora-rank 32 --learning-rate 1e-5"),
    ):
        assert line in text_of(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_those_of_the_paper(name):
    """Appendix A, Eq. 3, 5, 7 and Table 1."""
    config = load(name)
    expected = {
        "batch_size": 256,
        "minibatches": 2,  # of 128 prompts
        "mean_rollouts": 4,
        "min_rollouts": 2,
        "max_rollouts": 12,
        "num_bins": 10,
        "learning_rate": 1e-6,
        "kl_coef": 0.001,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "max_new_tokens": 4096,
        "steps": 1000,
        "controller": "published-prompt",
        "eval_temperature": 0.6,
        "eval_top_p": 0.8,
        "eval_top_k": 20,
        "eval_samples": 8,
        "dtype": "bfloat16",
        "loss": "grpo",
        "scale_rewards": True,
        "aggregation": "prompt",
        "data": "dapo-math",
    }
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_line_says_where_it_comes_from(name):
    """In the same line, or in a comment right above; departures are marked, and 8-bit moments are one."""
    lines = text_of(name).splitlines()
    keys = {i: setting[1] for i, line in enumerate(lines) if (setting := re.match(r"(\w+) = ", line))}
    assert set(load_preset(name)) - {"preset"} == set(keys.values())
    for i, key in keys.items():
        source = lines[i].partition("#")[2] or (lines[i - 1] if lines[i - 1].startswith("#") else "")
        assert source or key == "engine", f"{name}: {key} has no source"
    if load(name).optimizer != "adamw":
        assert re.search(r'^optimizer = "adamw8bit"  # Departs: ', text_of(name), re.M)
    assert "Departs" in text_of(name)


def test_clipping_advantages_at_5_never_binds():
    """As the published presets say: at most sqrt(n - 1), reached by one success among n, for n up to 12."""
    for n in range(2, 13):
        for successes in range(1, n):
            advantages = group_advantages(
                np.repeat([1.0, 0.0], [successes, n - successes]), np.zeros(n, int), scale=True
            )
            assert abs(advantages).max() <= math.sqrt(n - 1) + 1e-9 < 5


def test_rewards_of_plus_and_minus_one_are_no_other_setting():
    """As the published presets say: standardised advantages do not see a shift or a scale."""
    rewards, owner = np.array([1.0, 0.0, 0.0, 1.0, 0.0]), np.zeros(5, int)
    ours, theirs = (group_advantages(r, owner, scale=True) for r in (rewards, 2 * rewards - 1))
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_presets_differ_in_method_and_not_in_budget(name):
    """Same prompts, rollouts, lengths, steps and evaluation as the published form, so that the two compare."""
    ours, theirs = load(name), load(f"{name}-published")
    assert (ours.controller, ours.loss, ours.kl_coef, ours.importance_cap) == ("recommended", "dapo", 0.0, 2.0)
    for key in (
        *("model", "data", "test_data", "template", "batch_size", "mean_rollouts", "max_rollouts"),
        *("max_new_tokens", "temperature", "minibatches", "learning_rate", "steps", "eval_every", "eval_samples"),
        *("eval_temperature", "eval_top_p", "eval_top_k"),
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert (build_controller(ours).rollout.min_rollouts, theirs.min_rollouts) == (0, 2)  # ours may pass prompts over


@pytest.mark.parametrize("name", QWEN)
def test_presets_name_the_sets_and_leave_room_for_them(name):
    """Training and test sets by name, math grading, all test problems, a template that keeps its backslash."""
    config = load(name)
    assert config.data == "dapo-math"
    assert config.test_data.split(",") == ["math500", "aime24", "aime25", "amc23", "minerva", "olympiadbench"]
    assert config.test_problems >= 500 + 30 + 30 + 83 + 272 + 675
    assert config.grader == "math"
    assert r"\boxed{}" in config.template
    assert "\nProblem: {problem}\n" in config.template
    assert not config.template.endswith((" ", "\n")), "a completion starts with its own space"
    assert config.engine == "vllm"
    assert config.gradient_checkpointing


@pytest.mark.parametrize("name", QWEN)
def test_the_controllers_of_presets_exist(name):
    """With these budgets."""
    config = load(name)
    published = config.controller.startswith("published")
    assert isinstance(build_controller(config), PublishedController if published else GDROController)
