"""A GRPO training loop for language models, steered by the controllers of `gdro_core`.

    Config         every setting of a run, checked
    load_preset    the settings of a preset or of a .toml file: `Config(**load_preset("quickstart"))`
    train          train one policy into a run directory
    evaluate       mean@n and pass@k of a model or of a run, with intervals
    compare        methods x seeds, paired, with intervals (methods: `gdro_llm.measuring.compare.Method.parse`)
    write_report   HTML page and figures of one or more runs
    UsageError     raised for what cannot be; its text names the argument, the rule and the value

These names are imported when they are used, so that `import gdro_llm` loads no torch.

Names of arrays and tensors end in their dimensions, in order:

    _P   prompts
    _R   rollouts (flat, ragged: `counts_P[i]` rows of prompt i)
    _T   tokens of a completion
    _S   tokens of a whole row
    _N   tokens side by side
    _H   hidden
    _V   vocabulary
    _B   bins
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdro_llm.config import Config, UsageError, load_preset
    from gdro_llm.measuring.compare import compare
    from gdro_llm.measuring.eval import evaluate_model as evaluate
    from gdro_llm.measuring.report import write_report
    from gdro_llm.training.trainer import train

__all__ = ["Config", "UsageError", "compare", "evaluate", "load_preset", "train", "write_report"]

_PLACES = {
    "Config": ("config", "Config"),
    "UsageError": ("config", "UsageError"),
    "compare": ("measuring.compare", "compare"),
    "evaluate": ("measuring.eval", "evaluate_model"),
    "load_preset": ("config", "load_preset"),
    "train": ("training.trainer", "train"),
    "write_report": ("measuring.report", "write_report"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
