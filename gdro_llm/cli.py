"""The `gdro` command: train, compare, signal, eval, plan-memory, report, presets, warm-start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gdro_llm.config import (
    EVALUATION_KEYS,
    PRESETS,
    Config,
    UsageError,
    add_options,
    load_preset,
    preset_names,
    printable,
)
from gdro_llm.training.stopping import Stopped

DESCRIPTION = """\
Train a language model by GRPO, steered by group distributionally robust controllers.

  gdro train quickstart                                 tiny model, embedded arithmetic, CPU, a minute or two
  gdro train quickstart --controller grpo --seed 1      plain GRPO on the same prompts
  gdro train smollm2-arith --model DIR                  a real pretrained model on two CPU cores
  gdro train my.toml --data train.jsonl --test-data test.jsonl --grader math --template "Question: {problem} Answer:"
  gdro report runs/quickstart-grpo runs/quickstart-recommended
  gdro eval runs/quickstart-grpo --data cells           mean@n and pass@k of a run or of any model, with intervals
  gdro plan-memory qwen3-4b-dapo --gpu-memory 80        does it fit, and if not, what to change
  gdro train --help                                     every setting

Each step: the controller plans a weight and a number of rollouts for every prompt, the policy samples, completions are
graded, the controller observes, the policy is updated. `--controller` chooses who plans:

  grpo                    every prompt the same: the baseline
  recommended             both games, coupled: hard prompts weigh more and get more rollouts, at the same total
  recommended-prompt      weights only            published-prompt     weights as in arXiv 2601.19280
  recommended-rollout     rollouts only           published-rollout    rollouts, with --aggregation prompt
"""

EVALUATE = """\
Sample answers to the problems of one or several sets and report mean@n and pass@k, each with a 95 % interval.

  gdro eval embedded --data cells                       the shipped model: a few seconds on any CPU
  gdro eval runs/quickstart-grpo --data cells           what a run made of it: its last checkpoint and settings
  gdro eval Qwen/Qwen3-1.7B --data math500,aime24 --samples 16 --engine vllm
  gdro eval DIR --data mine.jsonl --grader number --prompt-style plain --template "Question: {problem} Answer:"

Without a run the settings are those of the data's preset (cells, ladder), or else: 16 answers of up to 4096 tokens,
math grader, chat prompts (--prompt-style plain for base models) that ask for \\boxed{}. Options override either.
The same command gives the same numbers on the same machine; each set's do not depend on the other sets.
"""


COMPARE = """\
Train every method with every seed, from the same warm start, on the same prompts, with the same total rollouts, and
say what the paired differences show. Run again, it goes on where it stopped.

  gdro compare quickstart --methods grpo,joint --seeds 4                    a few minutes on two cores
  gdro compare quickstart --methods grpo,null,prompt,rollout,joint,mopps,dapo,published-prompt+minibatches=2
  gdro compare smollm2-arith --model DIR --methods grpo,joint+adversary_step=1 --validation-problems 100

A method is a name, then settings after a plus each: grpo, null (the recommended plan dealt to random prompts), prompt,
rollout, joint (recommended, one game or both), implicit (uniform rollouts, with the weights that the planned ones would
imply), published-prompt, published-rollout, dr-grpo, dapo (only mixed groups; all rollouts count), mopps.

While a run trains it is evaluated on validation problems; the table is of the test problems, with the last weights, and
with those best on the validation problems. A difference counts as evidence where its 95 % bootstrap interval (over warm
starts and seeds) and a sign test agree; fewer than six seeds cannot give any.
"""


EXTRA = {"torch", "transformers", "safetensors", "peft", "math_verify", "pebble", "datasets", "tqdm", "matplotlib"}


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and leave with exit code 2."""
        self.exit(2, f"gdro: error: {message}; see {self.prog} --help\n" if _fails_first() else None)


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code: 0, 2 with one line on stderr for a mistake of the user, 130 or 143 when stopped."""
    parser = Parser(prog="gdro", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)

    train = subparsers.add_parser(
        "train",
        help="train one policy",
        usage="gdro train PRESET [--out DIR] [--resume | --fresh] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog="A run directory holds config.json, metrics.jsonl, evaluations.jsonl, checkpoints and report.html.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
    )
    train.add_argument("preset", help=f"one of {', '.join(preset_names())}, or a .toml file")
    train.add_argument("--out", type=Path, help="run directory [default runs/PRESET-CONTROLLER]")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    existing.add_argument("--fresh", action="store_true", help="delete an earlier run in --out and start over")
    add_options(train)

    evaluation = subparsers.add_parser(
        "eval",
        help="evaluate a model, or the last checkpoint of a run",
        usage="gdro eval MODEL --data NAME[,NAME...] [--samples N] [--out DIR] [--KEY VALUE ...]",
        description=EVALUATE,
        epilog="DIR holds evaluation.json (every number, successes by problem, settings), evaluation.md and .png.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40, width=118),
    )
    evaluation.add_argument("model", help='model folder, hub name, run directory, or "embedded"')
    evaluation.add_argument("--data", required=True, help="sets, names or files, separated by commas")
    evaluation.add_argument("--out", type=Path, help="folder to write [default runs/eval-NAME, after the model]")
    add_options(evaluation, tuple(key for key in EVALUATION_KEYS if key != "model"))

    report = subparsers.add_parser(
        "report", help="HTML report and PNGs of one or more runs (the first is the baseline)"
    )
    report.add_argument("runs", nargs="+", type=Path, help="run directories")
    report.add_argument("--out", type=Path, help="folder to write to [default: the last run's]")

    plan = subparsers.add_parser(
        "plan-memory",
        help="estimate GPU memory, before anything is loaded",
        usage="gdro plan-memory PRESET [--gpu-memory GB] [--gpus N] [--KEY VALUE ...]",
        description="Memory of a run by item and phase on each GPU; exit code 2 and remedies where it does not fit.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
    )
    plan.add_argument("preset", help=f"one of {', '.join(preset_names())}, or a .toml file")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="of each GPU, in GB of 1e9 bytes [%(default)g]")
    plan.add_argument("--gpus", type=int, default=1, help="GPUs that share the weights [%(default)s]")
    add_options(plan)

    comparison = subparsers.add_parser(
        "compare",
        help="methods x seeds, paired, with intervals",
        usage="gdro compare PRESET [--methods A,B] [--seeds N] [--models DIR,DIR] [--jobs N] [--out DIR] [--KEY VALUE]",
        description=COMPARE,
        epilog="DIR holds comparison.json, .csv (a line a run), .md, .tex, .png, and every run without its weights.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
    )
    comparison.add_argument("preset", help=f"one of {', '.join(preset_names())}, or a .toml file")
    comparison.add_argument("--methods", default="grpo,null,prompt,rollout,joint", help="the first is the baseline")
    comparison.add_argument("--seeds", type=int, default=8, help="runs of each method, from --seed on [%(default)s]")
    comparison.add_argument("--models", default="", help="warm starts; seed s starts from number s modulo their number")
    comparison.add_argument("--jobs", type=int, default=0, help="runs side by side [one on a GPU, else one a core]")
    comparison.add_argument("--out", type=Path, help="folder to write [default runs/compare-PRESET]")
    add_options(comparison)

    signal = subparsers.add_parser(
        "signal",
        help="signal and noise of one step's gradient, by method, at a fixed policy",
        usage="gdro signal PRESET [--methods A,B] [--warm-up N] [--batches N] [--out DIR] [--KEY VALUE]",
        description="Signal-to-noise ratio of a batch's gradient, and its cosine with exact gradients of mean@1 and "
        "pass@k, by method (as in `gdro compare --help`, but dapo and the published ones) at one policy (--model). "
        "Embedded cells only.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
    )
    signal.add_argument("preset", help=f"one of {', '.join(preset_names())}, or a .toml file")
    signal.add_argument("--methods", default="grpo,null,prompt,rollout,joint", help="[%(default)s]")
    signal.add_argument("--warm-up", type=int, default=20, help="batches that controllers learn from [%(default)s]")
    signal.add_argument("--batches", type=int, default=40, help="batches measured [%(default)s]")
    signal.add_argument("--out", type=Path, default=Path("runs/signal"), help="folder to write [%(default)s]")
    add_options(signal)

    presets = subparsers.add_parser("presets", help="list the presets, or print one with its settings")
    presets.add_argument("name", nargs="?", metavar="PRESET", help="print this one")

    warm_start = subparsers.add_parser("warm-start", help="make a warm-started tiny model (the shipped one, or others)")
    warm_start.add_argument(
        "testbed", choices=["cells", "cells-shared"], help="little or strong transfer between cells"
    )
    warm_start.add_argument("--size", choices=["0.9M", "3M", "12M"], default="0.9M", help="parameters [%(default)s]")
    warm_start.add_argument("--out", type=Path, default=Path("runs/warm-start"), help="folder to write [%(default)s]")
    warm_start.add_argument("--seed", type=int, default=1, help="1 makes the shipped weights [%(default)s]")

    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        commands: dict[str, Callable[..., None]] = {
            "train": _train,
            "plan-memory": _plan_memory,
            "eval": _evaluate,
            "report": _report,
            "presets": _presets,
            "compare": _compare,
            "signal": _signal,
            "warm-start": _warm_start,
        }
        if command != "train" and _processes() > 1:
            raise UsageError(f"gdro {command} works in one process only; start it without torchrun")
        commands[command](**arguments)
        sys.stdout.flush()
    except UsageError as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        return _mistake(f"{command} needs the package {package}: pip install 'gdro[llm]'")
    except BrokenPipeError:  # `gdro ... | head`; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as stopped:
        if _fails_first():
            print(f"gdro: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(
            "\nstopped" + ("; --resume continues from the last checkpoint" if command == "train" else ""),
            file=sys.stderr,
        )
        return 130
    except Exception:
        if _fails_first():
            raise
        return 1  # not raised: another process under torchrun failed first and says why; this one fell with it
    return 0


def _processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fails_first() -> bool:
    """Whether it is on this process to say why the command ends."""
    if _processes() == 1:
        return True
    from gdro_llm.engine.workers import fails_first

    return fails_first()


def _mistake(text: str) -> int:
    if _fails_first():
        print(f"gdro: error: {printable(text)}", file=sys.stderr)
    return 2


def _train(preset: str, out: Path | None, resume: bool, fresh: bool, **overrides: object) -> None:
    config = Config(**{**load_preset(preset), **overrides})
    out = out or Path("runs") / f"{config.preset}-{config.controller}"
    from transformers.utils import logging

    from gdro_llm.measuring.report import write_report
    from gdro_llm.training.trainer import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train(config, out, resume=resume, fresh=fresh, report=lambda run: write_report([run], run))
    if _processes() == 1 or os.environ["RANK"] == "0":
        _report([out], out)


def _evaluate(model: str, data: str, out: Path | None, **overrides: object) -> None:
    from transformers.utils import logging

    from gdro_llm.measuring.eval import evaluate_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    evaluate_model(model, data, out, **overrides)


def _report(runs: list[Path], out: Path | None) -> None:
    from gdro_llm.measuring.report import summary_table, write_report

    try:
        path = write_report(runs, out or runs[-1])
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"\n{summary_table(runs)}\n\nreport: {path}")


def _plan_memory(preset: str, gpu_memory: float, gpus: int, **overrides: object) -> None:
    from gdro_llm.engine.memory import check_fits, table

    config = Config(**{**load_preset(preset), **overrides})
    for name, value in (("--gpu-memory", gpu_memory), ("--gpus", gpus)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} must be above 0 and finite, got {value:g}")
    print(table(config, gpu_memory * 1e9, gpus))
    print(f"fits: {check_fits(config, gpu_memory * 1e9, gpus)}")


def _compare(
    preset: str, methods: str, seeds: int, models: str, jobs: int, out: Path | None, **overrides: object
) -> None:
    from gdro_llm.measuring.compare import compare_preset

    compare_preset(preset, methods, seeds, models, out, jobs, overrides)


def _signal(preset: str, methods: str, warm_up: int, batches: int, out: Path, **overrides: object) -> None:
    from gdro_llm.measuring.compare import Method
    from gdro_llm.measuring.signal import measure, table

    config = Config(**{**load_preset(preset), **overrides})
    print(table(measure(config, [Method.parse(text) for text in methods.split(",")], warm_up, batches, out)))
    print(f"\nfiles: {out}/signal.json, .md")


def _presets(name: str | None) -> None:
    if name is not None:
        if name not in preset_names():
            raise UsageError(f"no preset {name!r}: choose one of {', '.join(preset_names())}")
        print((PRESETS / f"{name}.toml").read_text(encoding="utf-8"), end="")
        return
    for each in preset_names():
        first = (PRESETS / f"{each}.toml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{each:26s} {first.removeprefix('# ')}")


def _warm_start(testbed: str, size: str, out: Path, seed: int) -> None:
    from gdro_llm.training.warm_start import warm_start

    warm_start(out, seed, testbed=testbed, size=size)


if __name__ == "__main__":
    sys.exit(main())
