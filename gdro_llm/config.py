"""One flat, typed configuration: defaults here, a TOML preset over them, the command line over that.

Unknown keys and values of the wrong type are errors. `config.json` in a run directory holds the result.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

PRESETS = Path(__file__).parent / "presets"
CONTROLLERS = (
    "grpo",
    "recommended",
    "recommended-prompt",
    "recommended-rollout",
    "published-prompt",
    "published-rollout",
)


class UsageError(ValueError):
    """The user asked for something that cannot be: shown as one line, without a traceback, exit code 2."""


def option(default: Any, group: str, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Config` with its help text."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. One seed decides all randomness."""

    preset: str = option("", "run", "name of the preset this configuration started from")
    seed: int = option(0, "run", "decides prompt order, samples and ties")
    steps: int = option(80, "run", "training steps (one batch each)")
    eval_every: int = option(
        20, "run", "steps between evaluations on the test problems; also before and after training"
    )
    save_every: int = option(20, "run", "steps between checkpoints; the last two are kept")

    model: str = option("embedded", "model", '"embedded" (tiny Qwen3 in this package), a model folder, or a hub name')
    trainable_layers: int = option(0, "model", "train only the last so many blocks (and the final norm); 0 trains all")
    dtype: str = option("float32", "model", "number format of weights and compute", ("float32", "bfloat16"))
    device: str = option("auto", "model", '"auto" takes a GPU if there is one', ("auto", "cpu", "cuda"))
    threads: int = option(0, "model", "CPU threads of torch; 0 takes its default, 1 is fastest for tiny models")

    data: str = option("cells", "data", '"cells", "ladder" (embedded arithmetic), or a .jsonl file of problem, answer')
    test_data: str = option("", "data", ".jsonl file of held-out problems (needed with a .jsonl file in --data)")
    template: str = option("{problem}", "data", "prompt of a .jsonl problem; {problem} is replaced")
    grader: str = option("exact", "data", "how a completion is graded", ("exact", "number", "math"))
    test_problems: int = option(1000, "data", "evaluate on at most so many test problems, the same ones always")

    controller: str = option("recommended", "controller", "who decides weights and rollouts", CONTROLLERS)
    batch_size: int = option(128, "controller", "prompts a step")
    mean_rollouts: int = option(4, "controller", "mean rollouts a prompt, n̄: the budget, met exactly in every step")
    min_rollouts: int = option(2, "controller", "fewest rollouts a prompt can get")
    max_rollouts: int = option(12, "controller", "most rollouts a prompt can get")
    num_bins: int = option(10, "controller", "difficulty bins, equal in pass rate")

    max_new_tokens: int = option(14, "sampling", "longest completion, in tokens")
    temperature: float = option(1.0, "sampling", "of training and evaluation samples")
    stop: str = option("", "sampling", "a token whose text holds this ends a completion, besides the model's own end")
    sample_rows: int = option(1024, "sampling", "sequences sampled side by side; lower it when memory is short")
    eval_samples: int = option(8, "sampling", "samples a test problem: mean@k and pass@k with this k")

    learning_rate: float = option(3e-4, "update", "peak, after a linear warm-up")
    warmup_steps: int = option(5, "update", "steps of linear warm-up")
    adam_beta2: float = option(0.99, "update", "AdamW's second moment; beta1 is 0.9")
    weight_decay: float = option(0.0, "update", "AdamW's decay")
    grad_clip: float = option(1.0, "update", "largest gradient norm")
    minibatches: int = option(1, "update", "updates a batch; above 1 the clipped ratio matters")
    clip_low: float = option(0.2, "update", "probability ratio is clipped below 1 - this")
    clip_high: float = option(0.28, "update", "probability ratio is clipped above 1 + this")
    scale_rewards: bool = option(True, "update", "divide advantages by the group's standard deviation")
    aggregation: str = option(
        "prompt",
        "update",
        "a prompt's factor in the loss: its weight, or its weight times its rollouts",
        ("prompt", "rollout"),
    )
    update_rows: int = option(256, "update", "sequences in one backward pass; lower it when memory is short")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"{spec.name} must be one of {', '.join(choices)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{spec.name} must be a finite number, got {value!r}")
        for name, low in _LOWEST.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "temperature", "grad_clip"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.seed >= 2**32:  # torch takes 64 bits, evaluations use seed + 2**32
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        if not self.adam_beta2 < 1:
            raise UsageError(f"adam_beta2 must be below 1, got {self.adam_beta2!r}")
        if not self.min_rollouts <= self.mean_rollouts <= self.max_rollouts:
            raise UsageError(
                "rollouts must satisfy min_rollouts <= mean_rollouts <= max_rollouts, "
                f"got {self.min_rollouts} <= {self.mean_rollouts} <= {self.max_rollouts}"
            )
        if self.batch_size % self.minibatches:
            raise UsageError(f"minibatches must divide batch_size = {self.batch_size}, got {self.minibatches}")
        if "{problem}" not in self.template:
            raise UsageError(f"template must contain {{problem}}, got {self.template!r}")

    def to_json(self) -> str:
        """The resolved configuration, one key a line."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


_LOWEST = {
    "seed": 0,
    "steps": 1,
    "eval_every": 1,
    "save_every": 1,
    "trainable_layers": 0,
    "threads": 0,
    "test_problems": 1,
    "batch_size": 1,
    "mean_rollouts": 1,
    "min_rollouts": 1,
    "num_bins": 1,
    "max_new_tokens": 1,
    "sample_rows": 1,
    "eval_samples": 1,
    "warmup_steps": 0,
    "adam_beta2": 0.0,
    "weight_decay": 0.0,
    "minibatches": 1,
    "clip_low": 0.0,
    "clip_high": 0.0,
    "update_rows": 1,
}


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Keys and values of a preset by name, or of a .toml file by path; refuses unknown keys and wrong types."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UsageError(f"no preset {name!r}: choose one of {', '.join(preset_names())}, or give a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, or not even text
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    types = get_type_hints(Config)
    for key, value in values.items():
        if key not in types or key == "preset":
            raise UsageError(f"{path} has the unknown key {key!r}; `gdro train --help` lists the keys")
        if types[key] is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not types[key]:
            raise UsageError(f"{path}: {key} must be a {types[key].__name__}, got {value!r}")
    return {"preset": path.stem, **values}


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every key of `Config`, grouped, with its help."""
    groups: dict[str, Any] = {}
    types = get_type_hints(Config)
    for spec in fields(Config):
        if spec.name == "preset":
            continue
        group = spec.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": spec.name, "help": spec.metadata["help"]}
        if types[spec.name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": types[spec.name], "metavar": types[spec.name].__name__.upper()}
            arguments["help"] += f" [default {spec.default!r}]".replace("%", "%%")
            if spec.metadata["choices"]:
                arguments |= {"choices": spec.metadata["choices"], "metavar": None}
        groups[group].add_argument(f"--{spec.name.replace('_', '-')}", **arguments)
