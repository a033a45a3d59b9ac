"""examples/verl_gdro.sh as it stands, by verl's own entry point, trains the tiny Qwen3 without a GPU.

Real are verl's task runner, sync trainer under `gdro_sync`, agent loops, TransferQueue, FSDP2 with gradients and AdamW
in two processes, weight transfer after every step, validation and checkpoints; cpu_platform.py says what is replaced.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file

from gdro_core import GDROController
from gdro_llm.config import Config
from gdro_llm.problems.load import load_problems

EXAMPLE = Path(__file__).parents[2] / "examples" / "verl_gdro.sh"
STEPS = 4
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(solution_str in ground_truth)
"""
OVERRIDES = [
    # the data, and sizes for them
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "data.max_prompt_length=16",
    "data.max_response_length=8",
    "reward.custom_reward_function.path=reward.py",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    f"trainer.total_training_steps={STEPS}",
    # a CPU: no flash attention, no FSDP1, no compiler; Ray counts two GPUs and 32 cores that are not there
    "trainer.device=cpu",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=False",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "+ray_kwargs.ray_init.num_gpus=2",
    "ray_kwargs.ray_init.num_cpus=32",
    "+ray_kwargs.ray_init.include_dashboard=False",
    # few processes; what the test reads
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "data.dataloader_num_workers=0",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "trainer.logger=[console,tensorboard,file]",
]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Folder in which the example has run, on two processes."""
    out = tmp_path_factory.mktemp("example")
    (out / "reward.py").write_text(REWARD)
    train, test = load_problems(Config())
    for name, problems in (("train", train[::35][:16]), ("test", test[::15][:8])):
        rows = [
            {
                "data_source": "cells",
                "prompt": [{"role": "user", "content": problem.prompt}],
                "reward_model": {"style": "rule", "ground_truth": list(problem.accepted)},
                "extra_info": {"index": index},
            }
            for index, problem in enumerate(problems)
        ]
        pandas.DataFrame(rows).to_parquet(out / f"{name}.parquet")
    here = Path(__file__).parent
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform,gdro_llm.integrations.verl",
        "VERL_FILE_LOGGER_PATH": str(out / "log.jsonl"),
        "GLOO_SOCKET_IFNAME": "lo",
        "MODEL": str(folder / "model"),
        "DATA": str(out),
        "GPUS": "2",
    }
    done = subprocess.run(
        [EXAMPLE, *OVERRIDES],
        cwd=out,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return out


def test_example_trains(run, folder):
    """Counts are moved within the budget, weights change, and the servers sample with them."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [row["data"] for row in rows if "actor/loss" in row["data"]]
    assert [step["training/global_step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert (step["gdro/rollouts"], step["gdro/missing_rollouts"]) == (8 * 8, 0)
        assert (step["actor/grad_norm"] > 0) == (step["gdro/mixed_share"] > 0)  # late in a run all may be right
        assert step["training/rollout_probs_diff_mean"] < 0.01  # bfloat16 there, float32 here
    assert steps[0]["actor/grad_norm"] > 0
    counts = {value for step in steps for key, value in step.items() if key.startswith("gdro/bin_rollouts/")}
    assert len(counts) > 1
    assert any("val-core/cells/acc/mean@1" in row["data"] for row in rows)


def test_example_saves(run, folder):
    """verl's checkpoint, and in it the controller that the example names."""
    (saved,) = (run / "checkpoints").glob("*/*/global_step_*")
    assert saved.name == f"global_step_{STEPS}"
    controller = GDROController.recommended(8, 0, 24)
    state = json.loads((saved / "gdro_controller.json").read_text())
    controller.load_state_dict(state)
    assert state["step"] == STEPS
    before = load_file(folder / "model" / "model.safetensors")["model.norm.weight"]
    parts = [torch.load(path, weights_only=False) for path in sorted(saved.glob("actor/model_world_size_2_rank_*.pt"))]
    after = torch.cat([part["model.norm.weight"].to_local() for part in parts])
    assert not torch.equal(before, after)
