"""One flat, typed configuration: defaults here, a TOML preset over them, the command line over that.

An option is declared once, at its field of `Config`: type, default, bounds, choices, help, and whether a run may be
resumed with another value, whether it is part of an evaluation, whether all methods of a comparison share it. Pydantic
checks types and bounds where they are declared, for keyword arguments, `dataclasses.replace` and old config.json files
alike; a mistake becomes a `UsageError` of one line. Rules between options are plain Python in `Config.__post_init__`.
`config.json` in a run directory holds the result.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from pydantic import ConfigDict, ModelWrapValidatorHandler, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from gdro_llm.training.losses import LOSSES

PRESETS = Path(__file__).parent / "presets"
CONTROLLERS = (
    "grpo",
    "recommended",
    "joint",
    "joint-prompt",
    "joint-rollout",
    "published-prompt",
    "published-rollout",
    "null",
    "joint-null",
    "implicit",
    "implicit-rollout",
    "mopps",
)
RECOMMENDED_STEP, JOINT_STEP = 0.6, 2.0  # of the entropic adversary, where `adversary_step` is 0
DIALS = {"entropic": "adversary_step", "cvar": "cvar_alpha", "chi-square": "chi_square_rho"}  # of the adversaries


class UsageError(Exception):
    """A mistake of the user: shown as one line, without a traceback, exit code 2.

    No ValueError, because pydantic and `except ValueError` around other code would catch it.
    """


def printable(text: str) -> str:
    """Text of a model or a data file, on one line; control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def option(
    group: str,
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    resumable: bool = False,
    evaluation: bool = False,
    shared: bool = False,
    **bounds: float,
) -> Any:
    """A field of `Config`.

    Args:
        group: heading in the help.
        default: value where neither preset nor command line gives one.
        text: help.
        choices: allowed texts; all where empty.
        resumable: a run may be resumed with another value: memory, speed and logs.
        evaluation: part of what decides an evaluation of a given model on given data.
        shared: the same for all methods of a comparison.
        bounds: `ge`, `gt`, `le`, `lt`, which pydantic reads from the metadata.
    """
    roles = {"resumable": resumable, "evaluation": evaluation, "shared": shared}
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, **roles, **bounds})


_run, _model, _controller = (partial(option, group) for group in ("run", "model", "controller"))
_data, _sampling, _update = partial(option, "data", shared=True), partial(option, "sampling"), partial(option, "update")
# and of these groups, what is part of an evaluation:
_loading = partial(_model, evaluation=True)
_grading = partial(_data, evaluation=True)
_decoding = partial(_sampling, evaluation=True, shared=True)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Config:
    """Everything that decides a run. One seed decides all randomness.

    Raises:
        UsageError: an unknown key, or a value of the wrong type, out of bounds or against a rule between options.
    """

    preset: str = _run("", "name of the preset this configuration started from")
    seed: int = _run(0, "decides prompt order, samples and ties", ge=0, lt=2**32, evaluation=True, shared=True)
    steps: int = _run(80, "training steps (one batch each)", ge=1)
    eval_every: int = _run(
        20, "steps between evaluations on the test problems; also before and after training", ge=1, shared=True
    )
    save_every: int = _run(20, "steps between checkpoints; the last two are kept", ge=1)

    model: str = _loading(
        "embedded", '"embedded" (tiny Qwen3 in this package), a model folder, or a hub name', shared=True
    )
    trainable_layers: int = _model(0, "train only this many last blocks (and the final norm); 0 trains all", ge=0)
    dtype: str = _loading(
        "auto",
        "number format of compute; trained weights are float32. auto: bfloat16 on GPUs and on CPUs with matrix units "
        "(AMX)",
        ("auto", "float32", "bfloat16"),
    )
    lora_rank: int = _model(0, "train low-rank adapters of this rank (peft) only; 0 trains the weights", ge=0)
    lora_alpha: float = _model(32.0, "scale of the adapters: alpha / rank", gt=0)
    gradient_checkpointing: bool = _model(
        False, "recompute activations in the backward pass: less memory", resumable=True
    )
    trust_remote_code: bool = _loading(False, "run code that a model repository ships")
    device: str = _loading("auto", '"auto" takes a GPU if there is one', ("auto", "cpu", "cuda"), resumable=True)
    threads: int = _loading(
        0, "CPU threads of torch; 0 takes its default, 1 is fastest for tiny models", ge=0, resumable=True
    )

    data: str = _data(
        "cells",
        '"cells", "cells-shared|-light|-heavy|-dead|-once", "ladder" (arithmetic); name of a set, .jsonl, .parquet',
    )
    test_data: str = _data("", "held-out sets, names or files, separated by commas (not for embedded data)")
    prompt_style: str = _grading("plain", "the template unchanged, or as the user's turn of a chat", ("plain", "chat"))
    thinking: bool = _grading(False, "let the chat template open a thinking block (Qwen3's enable_thinking)")
    template: str = _grading("{problem}", "prompt of a problem; {problem} is replaced")
    max_prompt_tokens: int = _data(1024, "training problems with longer prompts are left out, and counted", ge=1)
    grader: str = _grading("exact", "how a completion is graded", ("exact", "number", "math"))
    grade_seconds: float = _grading(5.0, "CPU time of grading a completion; one that takes more is wrong [s]", gt=0)
    grade_workers: int = _grading(0, "processes of the math grader; 0: one per core", ge=0, resumable=True)
    train_problems: int = _data(0, "train on at most this many problems, always the same ones; 0: all", ge=0)
    test_problems: int = _grading(1000, "evaluate on at most this many test problems, always the same ones", ge=1)
    validation_problems: int = _data(
        0,
        "evaluate on this many other held-out problems during training; the test problems are then left alone until "
        "the end: results of the last weights and of those best in validation pass@k. 0: evaluate on the test problems",
        ge=0,
    )
    reward_noise: float = _data(
        0.0, "share of the training grades that are flipped, as by a bad verifier", shared=False, ge=0, le=0.5
    )

    controller: str = _controller("recommended", "who decides weights and rollouts", CONTROLLERS)
    batch_size: int = _controller(128, "prompts per step", ge=1)
    # at least 2: one rollout has no advantage over itself
    mean_rollouts: int = _controller(4, "mean rollouts per prompt, n̄: the budget, met exactly in every step", ge=2)
    min_rollouts: int = _controller(
        0, "fewest rollouts that a prompt can get; 0: recommended may pass prompts over, the others give 2", ge=0
    )
    max_rollouts: int = _controller(12, "most rollouts that a prompt can get")
    num_bins: int = _controller(10, "difficulty bins, equal in pass rate", ge=1)
    candidates: int = _controller(
        2, "prompts that the recommended controller is offered for each one of the batch, to choose from", ge=1
    )
    kappa: float = _controller(
        0.5, "a prompt's own part of the gradient over the noise of a rollout, until it is measured", ge=0.0
    )
    learnt_prior: bool = _controller(
        False,
        "learn from the run what to expect of prompts not seen yet, or not for long (recommended controller)",
    )
    pilot: int = _controller(
        0,
        "rollouts that a prompt of which nothing is known gets first, with the recommended controller; the rest of the "
        "batch follows in a second stage, by what these have shown. 0: one stage",
        ge=0,
    )
    budget: str = _controller(
        "rollouts",
        "what n̄ rollouts a prompt set for every step: their number, or the tokens that they would cost (recommended)",
        ("rollouts", "tokens"),
    )
    measure_every: int = _controller(
        10,
        "steps between measurements of kappa by the recommended controller (at first every step, until it is known); "
        "0: none, kappa stays",
        ge=0,
    )
    verifier_error: float = _controller(
        0.0, "share of the grades that the verifier gets wrong, as known", ge=0, le=0.49
    )
    adversary: str = _controller("entropic", "of the weights", tuple(DIALS))
    adversary_step: float = _controller(
        0.0,
        "how far the entropic adversary goes (eta); 0: 0.6 for the recommended controller, 2 for joint play",
        ge=0.0,
    )
    cvar_alpha: float = _controller(0.5, "share of the prompts in the tail of the cvar adversary", gt=0, le=1)
    chi_square_rho: float = _controller(0.5, "radius of the chi-square adversary", ge=0.0)
    utility: str = _controller("variance", "of the rollouts of joint play", ("variance", "mixed", "hit"))

    engine: str = _sampling("hf", "transformers, or vLLM in this process", ("hf", "vllm"), evaluation=True)
    vllm_memory: float = _sampling(
        0.5, "share of GPU memory that vLLM takes while it samples", gt=0, le=1, resumable=True, evaluation=True
    )
    max_new_tokens: int = _decoding(14, "longest completion, in tokens", ge=1)
    temperature: float = _sampling(1.0, "of training samples (always from the whole distribution)", gt=0)
    eval_samples: int = _decoding(8, "samples per test problem: mean@k and pass@k with this k", ge=1)
    eval_exact: bool | None = _sampling(
        None,
        "compute mean@k and pass@k from success probabilities, without samples; unset: where these are known, which "
        "takes grader exact, the whole distribution, and texts of few tokenizations",
        shared=True,
    )
    eval_temperature: float = _decoding(1.0, "of evaluation samples", gt=0)
    eval_top_p: float = _decoding(1.0, "nucleus of evaluation samples; 1 is the whole distribution", gt=0, le=1)
    eval_top_k: int = _decoding(0, "evaluate from the k most likely tokens; 0 is all", ge=0)
    max_sampler_gap: float = _sampling(
        0.0,
        "stop when |log-probability of sampler - of trainer| exceeds this on average; 0: 0.1 with bfloat16, 0.01 with "
        "float32",
        ge=0,
        resumable=True,
    )
    stop: str = _decoding("", "a token whose text contains this ends a completion, as the model's own end does")
    sample_rows: int = _sampling(
        1024, "sequences sampled at once; lower it when memory is short", ge=1, resumable=True, evaluation=True
    )

    loss: str = _update("dapo", "surrogate and its mean", tuple(LOSSES))
    optimizer: str = _update("adamw", "adamw8bit: moments in 8 bits (torchao)", ("adamw", "adamw8bit"))
    learning_rate: float = _update(3e-4, "peak, after a linear warm-up", gt=0)
    warmup_steps: int = _update(5, "steps of linear warm-up", ge=0)
    adam_beta2: float = _update(0.99, "AdamW's second moment; beta1 is 0.9", ge=0.0, lt=1)
    weight_decay: float = _update(0.0, "AdamW's decay", ge=0.0)
    grad_clip: float = _update(1.0, "largest gradient norm", gt=0)
    minibatches: int = _update(1, "updates per pass over the batch; above 1 the clipped ratio matters", ge=1)
    passes: int = _update(1, "passes over each batch", ge=1)
    clip_low: float = _update(0.2, "probability ratio is clipped below 1 - this", ge=0.0)
    clip_high: float = _update(0.28, "probability ratio is clipped above 1 + this", ge=0.0)
    importance_cap: float = _update(
        0.0, "correct sampler/trainer mismatch by importance weights up to this; 0: ratios to the sampler's", ge=0.0
    )
    kl_coef: float = _update(0.0, "of the KL (k3) to the starting policy", ge=0.0)
    overlong: str = _update(
        "keep", "truncated completions: as others, left out of the loss, or punished", ("keep", "mask", "punish")
    )
    refill: bool = _update(False, "train on mixed groups only, gathered until a batch is full (DAPO)")
    overlong_buffer: int = _update(0, "last tokens over which the punishment grows from 0 to -1 (DAPO)", ge=0)
    preserve_objective: bool = _update(False, "rollouts change the update's variance only, not its mean (F6)")
    scale_rewards: bool = _update(True, "divide advantages by the group's standard deviation")
    aggregation: str = _update(
        "rollout", "a prompt's factor in the loss: its weight times its rollouts, or its weight", ("rollout", "prompt")
    )
    update_tokens: int = _update(
        8192, "padded tokens in one backward pass; lower it when memory is short", ge=1, resumable=True
    )

    log_to: str = option("logging", "", "besides the files: tensorboard, wandb, or both with a comma", resumable=True)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(values)
        except ValidationError as error:
            raise _mistake(error) from None

    def __post_init__(self) -> None:
        for name, spec in OPTIONS.items():
            value, choices = getattr(self, name), spec["choices"]
            if choices and value not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.refill and (self.controller.startswith("published") or self.kl_coef or self.overlong == "mask"):
            raise UsageError("refill needs kl_coef 0, overlong 'keep' or 'punish' and no published controller")
        for adversary, dial in DIALS.items():
            if adversary != self.adversary and self._is_set(dial):
                raise UsageError(f"{dial} changes nothing with adversary {self.adversary!r}")
        for name in sorted(self._without_effect()):
            if self._is_set(name):
                raise UsageError(f"{name} changes nothing with controller {self.controller!r}")
        if self._is_set("candidates") and self.candidates > 1 and self.min_rollouts:
            raise UsageError(
                "candidates above 1 need min_rollouts 0, so that some can be passed over, "
                f"got {self.candidates} with min_rollouts {self.min_rollouts}"
            )
        if 0 < self.importance_cap < 1:
            raise UsageError(f"importance_cap must be 0 (off) or at least 1, got {self.importance_cap!r}")
        if not LOSSES[self.loss].is_surrogate and self.controller.startswith("published"):
            raise UsageError(
                f"loss must not be {self.loss!r} with a published controller: its payoff is the clipped surrogate"
            )
        for name, value in _PRESERVING.items():
            if self.preserve_objective and getattr(self, name) != value:
                raise UsageError(f"preserve_objective needs {name} {value!r}, got {getattr(self, name)!r}")
        if self.preserve_objective and self.controller not in ("joint", "joint-prompt", "joint-rollout"):
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

    def _without_effect(self) -> set[str]:
        """Settings that the controller does not look at."""
        weights = {"adversary", *DIALS.values()}
        frontier = {"budget", "candidates", "kappa", "learnt_prior", "measure_every", "pilot", "verifier_error"}
        family, _, game = self.controller.partition("-")
        if family in ("recommended", "null"):
            return {"utility"} | ({"budget", "pilot"} if family == "null" else set())
        if family in ("joint", "implicit"):
            return frontier | {"prompt": {"utility"}, "rollout": weights}.get(game, set())
        return frontier | weights | {"utility"}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Config, name))

    def to_json(self) -> str:
        """The resolved configuration, one key a line."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def conflicts(self, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Differences that forbid a run with this configuration to continue one that was started as `before`.

        Args:
            before: what the config.json of the earlier run holds, see `named_as_now`; an absent key has its default.

        Returns:
            Earlier and present value of each key that differs, has an effect, and is not in `RESUMABLE`; where 0 stands
            for the controller's own default, that default.
        """
        now, then = asdict(self), named_as_now(before)
        idle = self._without_effect() if then.get("controller") == self.controller else set()
        idle |= {"eval_exact"} if self.eval_exact is None else set()  # a run goes on as it began
        frontier = self.controller in ("recommended", "null")
        own = {"adversary_step": RECOMMENDED_STEP if frontier else JOINT_STEP, "min_rollouts": 0 if frontier else 2}
        plain = before.keys() if "kappa" not in before else set()  # an earlier version's 0 is a 0
        pairs = {}
        for key in now.keys() - set(RESUMABLE) - idle - ({"dtype"} if self.dtype == "auto" else set()):
            old = then.get(key, getattr(Config, key))
            pairs[key] = (old if key in plain else old or own.get(key, old), now[key] or own.get(key, now[key]))
        return {key: pairs[key] for key in now if key in pairs and pairs[key][0] != pairs[key][1]}


def named_as_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote: before there was a `kappa`, "recommended" meant joint play."""
    values = dict(saved)
    family, dash, game = str(values.get("controller", "")).partition("-")
    if "kappa" not in saved and family in ("recommended", "null"):
        values["controller"] = {"recommended": "joint", "null": "joint-null"}[family] + dash + game
    return values


OPTIONS = {spec.name: spec.metadata for spec in fields(Config)}
TYPES: dict[str, type] = {  # without the None of what is unset
    name: next(iter(get_args(kind)), kind) for name, kind in get_type_hints(Config).items() if name in OPTIONS
}
EVALUATION_KEYS = tuple(name for name, spec in OPTIONS.items() if spec["evaluation"])
RESUMABLE = tuple(name for name, spec in OPTIONS.items() if spec["resumable"])
SHARED = tuple(name for name, spec in OPTIONS.items() if spec["shared"])

_PRESERVING = {"aggregation": "prompt", "scale_rewards": True, "overlong": "keep", "kl_coef": 0.0, "passes": 1}
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_RULES = {
    "greater_than_equal": "be at least {ge}",
    "greater_than": "be above {gt}",
    "less_than": "be below {lt}",
    "finite_number": "be a finite number",
}


def _mistake(error: ValidationError) -> UsageError:
    """The first error of pydantic, worded like all other mistakes."""
    first = error.errors(include_url=False)[0]
    name, kind = str(first["loc"][0]), first["type"]
    if name not in OPTIONS:
        return _unknown("Config", name)
    spec = {key: "2**32" if value == 2**32 else value for key, value in OPTIONS[name].items()}
    rule = _RULES.get(kind, f"be {_KINDS[TYPES[name]]}").format(**spec)
    if "le" in spec and kind in ("greater_than_equal", "greater_than", "less_than_equal"):
        rule = ("lie in [{ge}, {le}]" if "ge" in spec else "lie in ({gt}, {le}]").format(**spec)
    return UsageError(f"{name} must {rule}, got {first['input']!r}")


def _unknown(where: str, key: str) -> UsageError:
    near = get_close_matches(key, OPTIONS, 1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"{where} has the unknown key {key!r}; {meant}`gdro train --help` lists the keys")


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
    for key, value in values.items():
        if key not in OPTIONS or key == "preset":
            raise _unknown(str(path), key)
        try:
            values[key] = TypeAdapter(TYPES[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError:
            raise UsageError(f"{path}: {key} must be {_KINDS[TYPES[key]]}, got {value!r}") from None
    return {"preset": path.stem, **values}
