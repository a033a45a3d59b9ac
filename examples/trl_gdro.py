"""GRPO by TRL under the recommended controller: the tiny Qwen3 of this package, arithmetic, under a minute on a CPU."""

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from gdro_core import GDROController
from gdro_llm.config import Config
from gdro_llm.engine.policy import EMBEDDED_MODEL
from gdro_llm.integrations.trl import GDROTrainer, add_prompt_ids
from gdro_llm.problems.load import load_problems


def correct(completions: list[str], answers: list[list[str]], **_: object) -> list[float]:
    """1 for a right answer, else 0."""
    return [float(text in right) for text, right in zip(completions, answers, strict=True)]


if __name__ == "__main__":
    problems = load_problems(Config())[0][::17]
    rows = {"prompt": [p.prompt for p in problems], "answers": [list(p.accepted) for p in problems]}
    size = {"num_generations": 4, "per_device_train_batch_size": 64, "max_completion_length": 14, "max_steps": 30}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    GDROTrainer(
        str(EMBEDDED_MODEL),
        correct,
        GRPOConfig("runs/trl", learning_rate=3e-4, logging_steps=5, save_steps=10, report_to="none", **size, **cpu),
        add_prompt_ids(Dataset.from_dict(rows), source="cells"),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
        controller=GDROController.recommended(mean_rollouts=4, seed=0),
    ).train()
