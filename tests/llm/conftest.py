"""A random Qwen3 small enough for exact comparisons, in a folder as users have them, and ways to run it."""

import json
import os
import threading
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import literal
import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from gdro_llm.config import Config
from gdro_llm.engine.policy import EMBEDDED_MODEL, Policy, load_policy
from gdro_llm.problems.cells import character_tokenizer

torch.set_num_threads(1)  # more threads spin against each other on models this small
logging.disable_progress_bar()
# Some tests fork and kill: tqdm's default lock is shared by processes, and a child killed while it holds it would stop
# its parent for ever; nor may a monitor thread hold a lock at the moment of a fork.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random 2-layer model whose next-token distributions are far from uniform."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 15.0 if "proj" in name else 10.0
        model.lm_head.weight[tokenizer.eos_token_id] *= 4.0  # in some contexts the end is likely: ragged completions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model):
    """Config of the tiny model; keyword arguments override."""

    def build(**overrides) -> Config:
        values = {"model": str(tiny_model), "threads": 1, "device": "cpu", "dtype": "float32"}
        values |= {"max_new_tokens": 6, "learning_rate": 1e-3}
        return Config(**{**values, **overrides})

    return build


@pytest.fixture
def tiny(tiny_config) -> Policy:
    """The tiny policy at temperature 1, fresh."""
    return load_policy(tiny_config())


@pytest.fixture(scope="session")
def tiny_data(tiny_model, tmp_path_factory) -> dict[str, str]:
    """Training and test files whose answers are single tokens that the tiny model does produce: rewards are mixed."""
    policy = load_policy(Config(model=str(tiny_model), threads=1, device="cpu", dtype="float32"))
    prompts = [f"{a}*{b}=" for a in range(1, 10) for b in range(1, 10)]
    drawn = literal.sample(policy, literal.prompts(policy, prompts), np.ones(len(prompts), int), 1, seed=0, rows=100)
    rows = [
        {"id": f"tiny/{prompt}", "problem": prompt, "answer": text, "level": f"level {len(text) + i % 2}"}
        for i, (prompt, text) in enumerate(zip(prompts, drawn.texts, strict=True))
        if text.strip()
    ]
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows[:40]), ("test", rows[40:60])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {"data": str(folder / "train.jsonl"), "test_data": str(folder / "test.jsonl")}


@pytest.fixture
def run_config(tiny_config, tiny_data):
    """Config of a run that takes a second: 6 steps, checkpoints at 2, 4 and 6, evaluations at 0, 3 and 6."""

    def build(**overrides) -> Config:
        values = {"steps": 6, "eval_every": 3, "save_every": 2, "batch_size": 8, "max_new_tokens": 1, "eval_samples": 4}
        values["eval_exact"] = False  # evaluation goes through the sampler
        return tiny_config(**{**tiny_data, **values, **overrides})

    return build


@pytest.fixture(scope="session")
def embedded() -> Policy:
    """The shipped warm-started model; never train it in place."""
    if not (EMBEDDED_MODEL / "config.json").is_file():
        pytest.skip("the shipped model is not there yet")
    return load_policy(Config(threads=1, device="cpu", dtype="float32"))
