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

from gdro_llm.training.losses import LOSSES

PRESETS = Path(__file__).parent / "presets"
CONTROLLERS = (
    "grpo",
    "recommended",
    "recommended-prompt",
    "recommended-rollout",
    "published-prompt",
    "published-rollout",
    "null",
    "implicit",
    "implicit-rollout",
    "mopps",
)


EVALUATION_KEYS = (  # what decides an evaluation of a given model on given data
    "seed",
    "model",
    "dtype",
    "trust_remote_code",
    "device",
    "threads",
    "prompt_style",
    "thinking",
    "template",
    "grader",
    "grade_seconds",
    "grade_workers",
    "test_problems",
    "engine",
    "vllm_memory",
    "max_new_tokens",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "eval_top_k",
    "stop",
    "sample_rows",
)


RESUMABLE = (  # what a run may be resumed with otherwise than it was started: memory, speed and logs
    "gradient_checkpointing",
    "device",
    "threads",
    "grade_workers",
    "vllm_memory",
    "sample_rows",
    "update_tokens",
    "log_to",
)


class UsageError(ValueError):
    """The user asked for something that cannot be: shown as one line, without a traceback, exit code 2."""


def printable(text: str) -> str:
    """Text that others wrote (models, data files), on one line: what could steer a terminal is shown, not obeyed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    dtype: str = option("float32", "model", "number format of compute; weights are float32", ("float32", "bfloat16"))
    lora_rank: int = option(0, "model", "train low-rank adapters of this rank (peft) only; 0 trains the weights")
    lora_alpha: float = option(32.0, "model", "scale of the adapters: alpha / rank")
    gradient_checkpointing: bool = option(False, "model", "recompute activations in the backward pass: less memory")
    trust_remote_code: bool = option(False, "model", "run code that a model repository ships")
    device: str = option("auto", "model", '"auto" takes a GPU if there is one', ("auto", "cpu", "cuda"))
    threads: int = option(0, "model", "CPU threads of torch; 0 takes its default, 1 is fastest for tiny models")

    data: str = option(
        "cells", "data", '"cells", "cells-shared|-light|-heavy", "ladder" (arithmetic); name of a set, .jsonl, .parquet'
    )
    test_data: str = option("", "data", "held-out sets, names or files, separated by commas (not for embedded data)")
    prompt_style: str = option(
        "plain", "data", "the template as it stands, or as the user's turn of a chat", ("plain", "chat")
    )
    thinking: bool = option(False, "data", "let the chat template open a thinking block (Qwen3's enable_thinking)")
    template: str = option("{problem}", "data", "prompt of a problem; {problem} is replaced")
    max_prompt_tokens: int = option(1024, "data", "training problems with longer prompts are left out, and counted")
    grader: str = option("exact", "data", "how a completion is graded", ("exact", "number", "math"))
    grade_seconds: float = option(5.0, "data", "a completion that takes longer to grade counts as wrong")
    grade_workers: int = option(0, "data", "processes of the math grader; 0: one a core")
    train_problems: int = option(0, "data", "train on at most so many problems, the same ones always; 0: on all")
    test_problems: int = option(1000, "data", "evaluate on at most so many test problems, the same ones always")
    validation_problems: int = option(
        0,
        "data",
        "while training evaluate on so many other held-out problems; the test problems are then left alone until the "
        "end: results of the last weights and of those best in validation pass@k. 0: evaluate on the test problems",
    )
    reward_noise: float = option(
        0.0, "data", "share of the training grades that are turned round, as by a bad verifier"
    )

    controller: str = option("recommended", "controller", "who decides weights and rollouts", CONTROLLERS)
    batch_size: int = option(128, "controller", "prompts a step")
    mean_rollouts: int = option(4, "controller", "mean rollouts a prompt, n̄: the budget, met exactly in every step")
    min_rollouts: int = option(2, "controller", "fewest rollouts a prompt can get")
    max_rollouts: int = option(12, "controller", "most rollouts a prompt can get")
    num_bins: int = option(10, "controller", "difficulty bins, equal in pass rate")
    adversary: str = option("entropic", "controller", "of recommended weights", ("entropic", "cvar", "chi-square"))
    adversary_step: float = option(2.0, "controller", "how far the entropic adversary goes (eta)")
    utility: str = option("variance", "controller", "of recommended rollouts", ("variance", "mixed", "hit"))

    engine: str = option("hf", "sampling", "transformers, or vLLM in this process", ("hf", "vllm"))
    vllm_memory: float = option(0.5, "sampling", "share of GPU memory that vLLM takes while it samples")
    max_new_tokens: int = option(14, "sampling", "longest completion, in tokens")
    temperature: float = option(1.0, "sampling", "of training samples (always from the whole distribution)")
    eval_temperature: float = option(1.0, "sampling", "of evaluation samples")
    eval_top_p: float = option(1.0, "sampling", "nucleus of evaluation samples; 1 is the whole distribution")
    eval_top_k: int = option(0, "sampling", "evaluate from the k likeliest tokens; 0 is all")
    max_sampler_gap: float = option(
        0.1, "sampling", "stop when |log-probability of sampler - of trainer| exceeds this on average"
    )
    stop: str = option("", "sampling", "a token whose text holds this ends a completion, besides the model's own end")
    sample_rows: int = option(1024, "sampling", "sequences sampled side by side; lower it when memory is short")
    eval_samples: int = option(8, "sampling", "samples a test problem: mean@k and pass@k with this k")
    eval_exact: bool = option(
        False, "sampling", "compute mean@k and pass@k from probabilities instead (embedded cells)"
    )

    loss: str = option("dapo", "update", "surrogate and its mean", tuple(LOSSES))
    optimizer: str = option("adamw", "update", "adamw8bit: moments in 8 bits (torchao)", ("adamw", "adamw8bit"))
    learning_rate: float = option(3e-4, "update", "peak, after a linear warm-up")
    warmup_steps: int = option(5, "update", "steps of linear warm-up")
    adam_beta2: float = option(0.99, "update", "AdamW's second moment; beta1 is 0.9")
    weight_decay: float = option(0.0, "update", "AdamW's decay")
    grad_clip: float = option(1.0, "update", "largest gradient norm")
    minibatches: int = option(1, "update", "updates a pass over the batch; above 1 the clipped ratio matters")
    passes: int = option(1, "update", "passes over each batch")
    clip_low: float = option(0.2, "update", "probability ratio is clipped below 1 - this")
    clip_high: float = option(0.28, "update", "probability ratio is clipped above 1 + this")
    importance_cap: float = option(
        0.0, "update", "correct sampler/trainer mismatch by importance weights up to this; 0: ratios to the sampler's"
    )
    kl_coef: float = option(0.0, "update", "of the KL (k3) to the starting policy")
    overlong: str = option(
        "keep",
        "update",
        "truncated completions: as others, left out of the loss, or punished",
        ("keep", "mask", "punish"),
    )
    refill: bool = option(False, "update", "train on mixed groups only, gathered until a batch is full (DAPO)")
    overlong_buffer: int = option(0, "update", "last tokens over which the punishment grows from 0 to -1 (DAPO)")
    preserve_objective: bool = option(False, "update", "rollouts change the update's variance only, not its mean (F6)")
    scale_rewards: bool = option(True, "update", "divide advantages by the group's standard deviation")
    aggregation: str = option(
        "rollout",
        "update",
        "a prompt's factor in the loss: its weight times its rollouts, or its weight",
        ("rollout", "prompt"),
    )
    update_tokens: int = option(8192, "update", "padded tokens in one backward pass; lower it when memory is short")

    log_to: str = option("", "logging", "besides the files: tensorboard, wandb, or both with a comma")

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
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not 0 <= self.reward_noise <= 0.5:
            raise UsageError(f"reward_noise must lie in [0, 0.5], got {self.reward_noise!r}")
        if self.refill and (self.controller.startswith("published") or self.kl_coef or self.overlong == "mask"):
            raise UsageError("refill needs kl_coef 0, overlong 'keep' or 'punish' and no published controller")
        family, _, game = self.controller.partition("-")
        steered = family in ("recommended", "null", "implicit")
        if self.adversary_step != Config.adversary_step and self.adversary != "entropic":
            raise UsageError(f"adversary_step changes nothing with adversary {self.adversary!r}")
        for name, other in (("adversary", "rollout"), ("adversary_step", "rollout"), ("utility", "prompt")):
            if (not steered or game == other) and getattr(self, name) != getattr(Config, name):
                raise UsageError(f"{name} changes nothing with controller {self.controller!r}")
        for name in ("eval_top_p", "vllm_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} must lie in (0, 1], got {getattr(self, name)!r}")
        if 0 < self.importance_cap < 1:
            raise UsageError(f"importance_cap must be 0 (off) or at least 1, got {self.importance_cap!r}")
        if not LOSSES[self.loss].is_surrogate and self.controller.startswith("published"):
            raise UsageError(
                f"loss must not be {self.loss!r} with a published controller: its payoff is the clipped surrogate"
            )
        for name, value in _PRESERVING.items():
            if self.preserve_objective and getattr(self, name) != value:
                raise UsageError(f"preserve_objective needs {name} {value!r}, got {getattr(self, name)!r}")
        if self.preserve_objective and not self.controller.startswith("recommended"):
            raise UsageError(f"preserve_objective must be off with controller {self.controller!r}")
        if self.controller == "published-rollout" and self.aggregation != "prompt":
            raise UsageError("controller 'published-rollout' needs aggregation 'prompt', the mean of Eq. 7")
        if self.thinking and self.prompt_style != "chat":
            raise UsageError(f"thinking must be off with prompt_style {self.prompt_style!r}: only 'chat' opens a block")
        if self.lora_rank and self.trainable_layers:
            raise UsageError("trainable_layers must be 0 with lora_rank: adapters sit in all layers")
        if (self.overlong == "punish") != (self.overlong_buffer > 0) or self.overlong_buffer >= self.max_new_tokens:
            raise UsageError(
                "overlong_buffer must be above 0 and below max_new_tokens with overlong 'punish', and 0 without it, "
                f"got {self.overlong_buffer} with {self.overlong!r}"
            )
        if unknown := set(filter(None, self.log_to.split(","))) - {"tensorboard", "wandb"}:
            raise UsageError(f"log_to must name tensorboard, wandb or both, got {min(unknown)!r}")
        if self.seed >= 2**32:  # some generators take no more
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        if not self.adam_beta2 < 1:
            raise UsageError(f"adam_beta2 must be below 1, got {self.adam_beta2!r}")
        if not self.min_rollouts <= self.mean_rollouts <= self.max_rollouts:
            raise UsageError(
                "rollouts must satisfy min_rollouts <= mean_rollouts <= max_rollouts, "
                f"got {self.min_rollouts} <= {self.mean_rollouts} <= {self.max_rollouts}"
            )
        if 0 < self.train_problems < self.batch_size:
            raise UsageError(
                f"train_problems must be 0 (all) or at least batch_size = {self.batch_size}, got {self.train_problems}"
            )
        if self.batch_size % self.minibatches:
            raise UsageError(f"minibatches must divide batch_size = {self.batch_size}, got {self.minibatches}")
        if "{problem}" not in self.template:
            raise UsageError(f"template must contain {{problem}}, got {self.template!r}")

    def to_json(self) -> str:
        """The resolved configuration, one key a line."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


_PRESERVING = {"aggregation": "prompt", "scale_rewards": True, "overlong": "keep", "kl_coef": 0.0, "passes": 1}
_POSITIVE = (
    "learning_rate",
    "temperature",
    "eval_temperature",
    "grad_clip",
    "grade_seconds",
    "lora_alpha",
    "max_sampler_gap",
)
_LOWEST = {
    "seed": 0,
    "steps": 1,
    "eval_every": 1,
    "save_every": 1,
    "trainable_layers": 0,
    "threads": 0,
    "train_problems": 0,
    "test_problems": 1,
    "batch_size": 1,
    "mean_rollouts": 2,  # one has no advantage over itself
    "min_rollouts": 1,
    "num_bins": 1,
    "max_new_tokens": 1,
    "sample_rows": 1,
    "eval_samples": 1,
    "warmup_steps": 0,
    "adam_beta2": 0.0,
    "validation_problems": 0,
    "adversary_step": 0.0,
    "weight_decay": 0.0,
    "minibatches": 1,
    "clip_low": 0.0,
    "clip_high": 0.0,
    "update_tokens": 1,
    "lora_rank": 0,
    "max_prompt_tokens": 1,
    "grade_workers": 0,
    "eval_top_k": 0,
    "passes": 1,
    "importance_cap": 0.0,
    "kl_coef": 0.0,
    "overlong_buffer": 0,
}


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


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
            raise UsageError(f"{path}: {key} must be {_KINDS[types[key]]}, got {value!r}")
    return {"preset": path.stem, **values}


def add_options(parser: argparse.ArgumentParser, only: tuple[str, ...] = ()) -> None:
    """A flag for every key of `Config`, grouped, with its help and default.

    With `only`, for `gdro eval`: these keys, without defaults (a run or the data has them), `--eval-x` also as `--x`.
    """
    groups: dict[str, Any] = {}
    types = get_type_hints(Config)
    for spec in fields(Config):
        if spec.name == "preset" or (only and spec.name not in only):
            continue
        group = spec.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": spec.name, "help": spec.metadata["help"]}
        default: Any = spec.default
        if not only and default != "":
            arguments["help"] += f" [default {('off', 'on')[default] if types[spec.name] is bool else default}]"
        if types[spec.name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": types[spec.name], "metavar": types[spec.name].__name__.upper()}
            if spec.metadata["choices"]:
                arguments |= {"choices": spec.metadata["choices"], "metavar": None}
        names = [spec.name.removeprefix("eval_"), spec.name] if only else [spec.name]  # `gdro eval --samples`
        groups[group].add_argument(*(f"--{name.replace('_', '-')}" for name in dict.fromkeys(names)), **arguments)
