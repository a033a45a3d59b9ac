"""`gdro signal`: the exact gradient, the split of a batch, and the command."""

import json

import literal
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gdro_llm.cli import main  # noqa: E402
from gdro_llm.config import Config, load_preset  # noqa: E402
from gdro_llm.engine.policy import load_policy  # noqa: E402
from gdro_llm.engine.transformers import HFSampler  # noqa: E402
from gdro_llm.engine.workers import SINGLE_PROCESS  # noqa: E402
from gdro_llm.measuring.signal import _summary, ascent, exact_gradient  # noqa: E402
from gdro_llm.problems.cells import cell_problems  # noqa: E402
from gdro_llm.problems.rewards import Grader  # noqa: E402
from gdro_llm.training.clock import Clock  # noqa: E402
from gdro_llm.training.evaluation import exact_rates  # noqa: E402
from gdro_llm.training.planners import build_controller  # noqa: E402
from gdro_llm.training.step import collect  # noqa: E402
from gdro_llm.training.update import update  # noqa: E402


@pytest.mark.parametrize("k", [1, 8])
def test_the_exact_gradient_is_the_slope_of_the_exact_rate(k):
    """Along a random direction and along itself, by central differences (logits stay in float32)."""
    config = Config(**load_preset("quickstart"))
    policy = load_policy(config)
    policy.model.double()
    problems = cell_problems("train", {"easy": 1, "middle": 1, "hard": 1}, seed=7)[::3]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def rate() -> float:
        return float((1.0 - (1.0 - exact_rates(policy, problems, config)) ** k).mean())

    gradient = exact_gradient(policy, problems, config, exact_rates(policy, problems, config), k, rows=5).double()
    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in (gradient / gradient.norm(), other / other.norm()):
        slopes = []
        for step in (1e-3, -2e-3, 1e-3):  # up, down, back
            with torch.no_grad():
                for p, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                    p.add_(step * part.view_as(p))
            slopes.append(rate())
        assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(float(gradient @ direction), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("snr", [0.5, 2.0, 10.0])
def test_the_split_recovers_signal_and_noise(snr):
    """Halves with a known mean m and noise: |m|^2 / (noise of their average), and the cosine with m."""
    generator, size, batches = torch.Generator().manual_seed(0), 50, 4000
    mean = torch.randn(size, generator=generator)
    spread = (2 * mean.square().sum() / (size * snr)).sqrt()  # of a half: the average has half its variance
    halves = mean + spread * torch.randn(batches, 2, size, generator=generator)
    summary = _summary(halves, {"u": 3.0 * mean})
    assert summary["SNR"]["low"] < summary["SNR"]["value"] < summary["SNR"]["high"]
    assert summary["SNR"]["value"] == pytest.approx(snr, rel=0.05)
    assert summary["cosine with u"]["value"] == pytest.approx(np.sqrt(snr / (1 + snr)), rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"loss": "gspo", "minibatches": 2, "passes": 2, "importance_cap": 2.0}])
def test_the_direction_is_that_of_one_step_on_the_whole_batch(settings):
    """Of plain gradient descent at rate 1; no weight moves, no gradient is left, and none of before is taken along."""
    config = Config(**{**load_preset("quickstart"), "batch_size": 8, "controller": "recommended", **settings})
    policy = load_policy(config)
    with Grader(config) as grader:
        problems = cell_problems("train", {"easy": 1, "middle": 1, "hard": 1}, seed=7)
        parts = (
            build_controller(config),
            HFSampler(policy, config),
            grader,
            config,
            SINGLE_PROCESS,
            Clock(policy.device),
        )
        batch = collect(0, problems, *parts).batch
    before = literal.weights(policy)
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    direction = ascent(policy, batch, config)
    assert all(torch.equal(before[name], weight) for name, weight in literal.weights(policy).items())
    assert not literal.gradients(policy)
    once = Config(**{**load_preset("quickstart"), **settings, "minibatches": 1, "passes": 1, "grad_clip": 1e9})
    update(policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), batch, once)
    step = torch.cat([(weight - before[name]).flatten() for name, weight in literal.weights(policy).items()])
    assert direction.norm() > 0
    assert (direction - step).norm() < 1e-4 * step.norm()


def test_the_command_measures_every_method_and_moves_no_weight(tmp_path, capsys):
    """Before it has learnt anything the joint controller plans as plain GRPO: the same numbers."""
    flags = [
        "--methods",
        "grpo,joint,mopps,grpo+reward_noise=0.5",
        "--warm-up",
        "0",
        "--batches",
        "2",
        "--batch-size",
        "16",
    ]
    assert main(["signal", "quickstart", *flags, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "signal.json").read_text())
    assert list(saved["methods"]) == ["grpo", "joint", "mopps", "grpo+reward_noise=0.5"]
    assert saved["methods"]["grpo"] == saved["methods"]["joint"] != saved["methods"]["mopps"]
    up = {label: values["cosine with mean@1"]["value"] for label, values in saved["methods"].items()}
    assert up["grpo"] > 0.2 > up["grpo+reward_noise=0.5"]  # a step goes up, but not where rewards say nothing
    assert (tmp_path / "signal.md").read_text().strip() in capsys.readouterr().out


def test_the_problems_are_those_of_a_run(tmp_path):
    """`train_problems` and `validation_problems` leave the same problems as in training."""
    common = ["--methods", "grpo", "--warm-up", "0", "--batches", "2", "--batch-size", "16", "--out"]
    results = []
    for name, flags in (("all", []), ("few", ["--train-problems", "16"])):
        assert main(["signal", "quickstart", *common, str(tmp_path / name), *flags]) == 0
        results.append(json.loads((tmp_path / name / "signal.json").read_text())["methods"])
    assert results[0] != results[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "1"], "batches must be at least 2"),
        (["--grader", "number"], "success probabilities are unknown: grader 'number'"),
        (["--methods", "grpo,dapo"], "cannot measure 'dapo', which waits for mixed groups of several batches"),
        (["--methods", "published-prompt"], "cannot measure 'published-prompt', which learns from the losses"),
        (["--methods", "published-rollout"], "cannot measure 'published-rollout', which learns from the losses"),
        (["--methods", "grpo+kl_coef=0.1"], "which has a KL term to the very policy that is measured"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, flags, message):
    assert main(["signal", "quickstart", *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
