"""The command as users start it: with vLLM, with two processes, and with a sampler that is not the trainer's policy."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from marks import needs_vllm
from safetensors.torch import load_file

import gdro_llm.measuring.eval as eval_command
import gdro_llm.training.trainer as trainer
from gdro_llm.cli import main
from gdro_llm.config import UsageError
from gdro_llm.engine.sampler import make_sampler
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.training.trainer import train

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(
    arguments: list[str], processes: int = 1, *, works: bool = True, program: tuple[str, ...] = ("-m", "gdro_llm.cli")
) -> subprocess.CompletedProcess:
    """`gdro train` in a process of its own, or in several under torchrun."""
    start = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
        start += ["--master-addr=127.0.0.1"]
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [*start, *program, "train", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode == 0) == works, done.stderr[-3000:]
    return done


@needs_vllm
def test_vllm_samples_the_policy_that_is_trained(tmp_path):
    """The embedded model, whose output layer is tied to its input: from both engines the same rates before training (to
    4 standard errors of both: 6e-5 with other seeds), and the trainer's own log-probabilities in every later step."""
    quick = ["--steps", "3", "--eval-every", "3", "--save-every", "3", "--test-problems", "200", "--batch-size", "32"]
    quick += ["--no-eval-exact"]
    first_rows = {}
    for engine, run in (("hf", lambda arguments: main(["train", *arguments])), ("vllm", command)):
        out = tmp_path / engine
        run(["quickstart", *quick, "--engine", engine, "--max-prompt-tokens", "64", "--out", str(out)])
        first_rows[engine] = literal.read_log(out / "evaluations.jsonl")[0]
        gaps = [row["sampler_gap"] for row in literal.read_log(out / "metrics.jsonl")]
        assert 0 < max(gaps) < 1e-4
    one, other = first_rows["hf"], first_rows["vllm"]
    assert abs(one["mean@8"] - other["mean@8"]) < 4 * np.hypot(one["mean@8_se"], other["mean@8_se"])
    assert one["correct"] != other["correct"], "the engines draw by themselves"


def test_two_processes_run_the_same_loop(run_config, tmp_path):
    """Same draws, plans, rewards and evaluations as one process; losses and weights to rounding; and one process goes
    on from the checkpoint that two have written."""
    config = run_config(steps=4, save_every=2, learning_rate=1e-3, max_new_tokens=4, minibatches=2)
    text = "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in json.loads(config.to_json()).items() if key != "preset"
    )
    (tmp_path / "tiny.toml").write_text(text)
    train(config, tmp_path / "1")
    done = command([str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "2")], 2)
    assert done.stdout.count("report: ") == 1, "only the first process writes"
    one, two = (literal.read_log(tmp_path / str(n) / "metrics.jsonl") for n in (1, 2))
    assert len(one) == len(two) == 4
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            if mine[key] is not None:
                np.testing.assert_allclose(
                    np.array(other[key], float), np.array(mine[key], float), rtol=1e-3, atol=1e-5, err_msg=key
                )
    first, second = (literal.read_log(tmp_path / str(n) / "evaluations.jsonl") for n in (1, 2))
    assert [row["correct"] for row in first] == [row["correct"] for row in second]
    whole = [load_file(tmp_path / str(n) / "checkpoint-000004" / "model.safetensors") for n in (1, 2)]
    assert whole[0].keys() == whole[1].keys()
    for name, weight in whole[0].items():
        assert torch.allclose(whole[1][name], weight, atol=2e-4), name
    last = tmp_path / "2" / "checkpoint-000004"
    last.rename(tmp_path / "last")
    train(replace(config, preset="tiny"), tmp_path / "2", resume=True)
    for name, weight in load_file(last / "model.safetensors").items():
        assert torch.allclose(load_file(tmp_path / "last" / "model.safetensors")[name], weight, atol=2e-4), name


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What the processes themselves wrote of their end, without torchrun's own account of it."""
    ours = done.stderr.partition("torch/distributed/elastic")[0].splitlines()
    return [line for line in ours if "Traceback" in line or "Error" in line or line.startswith("gdro: ")]


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_is_one_line(run_config, tmp_path):
    """The first process alone looks at the run directory; the others must end with it, and silently."""
    (tmp_path / "config.json").write_text(run_config().to_json())
    (line,) = said(command(["quickstart", "--out", str(tmp_path)], 2, works=False))
    assert line.startswith(f"gdro: error: {tmp_path} holds a run already: --resume continues it")


@pytest.mark.slow
def test_a_mistake_is_one_line_whoever_finds_it(tmp_path):
    """All processes, before they know of each other; or the second one alone, in the middle of a step."""
    (line,) = said(command(["quickstart", "--min-rollouts", "9"], 2, works=False))
    assert line.startswith("gdro: error: rollouts must satisfy")
    script = tmp_path / "second.py"
    script.write_text(
        "import os, sys\n"
        "import gdro_llm.training.trainer as trainer\n"
        "from gdro_llm.cli import main\n"
        "def fail(*_):\n"
        "    raise FloatingPointError('spoilt')\n"
        "if os.environ['RANK'] == '1':\n"
        "    trainer.update = fail\n"
        "sys.exit(main())\n"
    )
    quick = ["--test-problems", "20", "--batch-size", "8", "--out", str(tmp_path / "run")]
    (line,) = said(command(["quickstart", *quick], 2, works=False, program=(str(script),)))
    assert line.startswith("gdro: error: step 1: spoilt")


def test_engines_have_room_for_every_prompt_that_is_evaluated(run_config, tiny_model, tmp_path, monkeypatch):
    """max_prompt_tokens leaves training problems out; vLLM, which reserves its room, must take longer ones in tests."""
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({"id": "longer", "problem": "100*10=", "answer": "1"}) + "\n")
    asked = []
    for module in (trainer, eval_command):
        monkeypatch.setattr(
            module, "make_sampler", lambda policy, config: (asked.append(config), make_sampler(policy, config))[1]
        )
    small = {"max_prompt_tokens": 4, "eval_samples": 1}
    train(run_config(steps=1, test_data=str(longer), **small), tmp_path / "run")
    settings = {"grader": "exact", "prompt_style": "plain", "template": "{problem}", "max_new_tokens": 1}
    eval_command.evaluate_model(str(tiny_model), str(longer), tmp_path / "eval", threads=1, **settings, **small)
    assert [config.max_prompt_tokens for config in asked] == [7, 7]


@pytest.mark.parametrize(("off", "settings"), [(0.0, {}), (0.02, {}), (0.02, {"max_sampler_gap": 0.1}), (0.3, {})])
def test_a_sampler_that_is_not_the_policy_stops_the_run(run_config, tmp_path, monkeypatch, off, settings):
    """Also when no completion is correct, so that there is nothing to train on; before anything is saved."""
    draw = HFSampler.sample

    def stale(*args, **kwargs):
        rollouts = draw(*args, **kwargs)
        rollouts.logprobs_R_T = rollouts.logprobs_R_T - off * rollouts.mask_R_T
        rollouts.texts = ["wrong"] * len(rollouts.texts)
        return rollouts

    monkeypatch.setattr(HFSampler, "sample", stale)
    if off <= settings.get("max_sampler_gap", 0.01):
        train(run_config(**settings), tmp_path / "run")
        return
    with pytest.raises(UsageError, match=rf"step 1: .*{off} off the trainer's.*max_sampler_gap = 0\.01.*--engine hf"):
        train(run_config(**settings), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
