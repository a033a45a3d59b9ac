"""The `gdro` command: train, compare, signal, eval, plan-memory, report, presets, warm-start.

Click parses it: it suggests near names instead of guessing abbreviated flags, completes in shells, and raises one
exception for each mistake, which is printed as one line. Flags come from the fields of `Config`, whose bounds and rules
hold here too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from inspect import cleandoc
from pathlib import Path

import click
from click.shell_completion import CompletionItem, shell_complete

from gdro_llm.config import (
    EVALUATION_KEYS,
    OPTIONS,
    PRESETS,
    TYPES,
    Config,
    UsageError,
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
  gdro train quickstart --help                          every setting, with the preset's values
  eval "$(_GDRO_COMPLETE=bash_source gdro)"             complete commands, flags and presets (zsh_source, fish_source)

Each step: the controller plans a weight and a number of rollouts for every prompt, the policy samples, completions are
graded, the controller observes, the policy is updated. `--controller` chooses the planner:

  grpo                every prompt the same: the baseline
  recommended         most rollouts for prompts that are solved sometimes, few or none for solved and hopeless ones
  joint               weights and rollouts lean to hard prompts (joint-prompt, joint-rollout: one of the two)
  published-prompt    weights as in arXiv 2601.19280; published-rollout: rollouts, with --aggregation prompt
"""

EXTRA = {"torch", "transformers", "safetensors", "peft", "math_verify", "pebble", "datasets", "tqdm", "matplotlib"}
EXTRA |= {"pydantic", "click"}  # without which nothing here can be imported: `gdro_llm.__main__` says so
METHODS = "grpo,null,joint,recommended"
FOLDER = click.Path(path_type=Path)


class Setting(click.Option):
    """A field of `Config` as a flag, which reaches the command only if given. `short`: `--eval-x` is also `--x`."""

    def __init__(self, name: str, *, short: bool = False) -> None:
        kind, choices = TYPES[name], OPTIONS[name]["choices"]
        names = [name.removeprefix("eval_"), name] if short else [name]
        flags = [f"--{flag.replace('_', '-')}" for flag in dict.fromkeys(names)]
        super().__init__(
            [*([f"{flag}/--no-{flag[2:]}" for flag in flags] if kind is bool else flags), name],
            type=click.Choice(choices) if choices else kind,
            default=None,
            help=OPTIONS[name]["help"],
            expose_value=False,
            callback=_keep,
        )

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """The default: from the preset in `ctx.obj`, or of `Config`; none where `ctx.obj` is None (`gdro eval`)."""
        value = None if ctx.obj is None else ctx.obj.get(self.name, getattr(Config, self.name))
        text = ("off", "on")[value] if isinstance(value, bool) else printable(str("" if value is None else value))
        return {"default": text} if text else {}


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value is not None:
        ctx.params[param.name] = value


class Command(click.Command):
    """Prints its description unchanged, and settings in their groups, with the defaults of PRESET if it has one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the defaults that the help shows into `ctx.obj`: the values of PRESET, else {} for `Config`'s."""
        if not ctx.resilient_parsing and any(param.name == "preset" for param in self.params):
            words = [arg for arg in args if arg not in ctx.help_option_names]
            known = self.make_context(ctx.info_name, words, ctx.parent, resilient_parsing=True).params
            ctx.obj = load_preset(known["preset"]) if known.get("preset") and len(words) < len(args) else {}
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its lines are not joined: some are examples."""
        formatter.write(f"\n{cleandoc(self.help or '')}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {"options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (row := param.get_help_record(ctx)):
                group = OPTIONS[param.name]["group"] if isinstance(param, Setting) else "options"
                sections.setdefault(group, []).append(row)
        for group, rows in sections.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(rows)


class Commands(click.Group):
    """Lists the commands in the order below."""

    command_class = Command
    format_help_text = Command.format_help_text

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code: 0, 2 with one line on stderr for a mistake of the user, 130 or 143 when stopped."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if instruction := os.environ.get("_GDRO_COMPLETE"):
        return shell_complete(gdro, {}, "gdro", "_GDRO_COMPLETE", instruction)
    context = click.Context(gdro)
    try:
        with gdro.make_context("gdro", sys.argv[1:] if argv is None else [*argv]) as context:
            gdro.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as left:  # after --help
        return left.exit_code
    except click.UsageError as error:
        text = " ".join(error.format_message().split()).removesuffix(".")
        path = error.ctx.command_path if error.ctx else f"gdro {context.invoked_subcommand or ''}".strip()
        return _mistake(f"{text[0].lower()}{text[1:]}{'' if text.endswith(('?', '?)')) else ';'} see {path} --help")
    except UsageError as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        return _mistake(f"{context.invoked_subcommand} needs the package {package}: pip install 'gdro[llm]'")
    except BrokenPipeError:  # `gdro ... | head`; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as stopped:
        if _reports_failure():
            print(f"gdro: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        resumes = "; --resume continues from the last checkpoint" if context.invoked_subcommand == "train" else ""
        print(f"\nstopped{resumes}", file=sys.stderr)
        return 130
    except Exception:
        if _reports_failure():
            raise
        return 1  # not raised: another process under torchrun failed first and says why; this one failed because of it
    return 0


def _processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _reports_failure() -> bool:
    """Whether this process says why the command ends."""
    if _processes() == 1:
        return True
    from gdro_llm.engine.workers import is_first_failure

    return is_first_failure()


def _mistake(text: str) -> int:
    if _reports_failure():
        print(f"gdro: error: {printable(text)}", file=sys.stderr)
    return 2


def _settings(names: Iterable[str] = OPTIONS, *, short: bool = False) -> list[click.Parameter]:
    return [Setting(name, short=short) for name in names if name != "preset"]


def _presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completions of PRESET in the shell: presets, or else a file."""
    near = [CompletionItem(name) for name in preset_names() if name.startswith(incomplete)]
    return near or [CompletionItem(incomplete, type="file")]


_preset = click.argument("preset", help=f"one of {', '.join(preset_names())}, or a .toml file", shell_complete=_presets)


@click.group(
    cls=Commands,
    help=DESCRIPTION,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.pass_context
def gdro(context: click.Context) -> None:
    """Refuse torchrun for commands that work in one process."""
    if context.invoked_subcommand != "train" and _processes() > 1:
        raise UsageError(f"gdro {context.invoked_subcommand} works in one process only; start it without torchrun")


@gdro.command(
    help=DESCRIPTION,
    short_help="Train one policy.",
    epilog="A run directory holds config.json, metrics.jsonl, evaluations.jsonl, checkpoints and report.html.",
    params=_settings(),
)
@_preset
@click.option("--out", type=FOLDER, help="run directory", show_default="runs/PRESET-CONTROLLER")
@click.option("--resume", is_flag=True, help="continue from the last checkpoint, if there is one")
@click.option("--fresh", is_flag=True, help="delete an earlier run in --out and start over")
def train(preset: str, out: Path | None, resume: bool, fresh: bool, **settings: object) -> None:
    """Train, then write the report."""
    if resume and fresh:
        raise click.UsageError("--fresh is not allowed with --resume")
    config = Config(**{**load_preset(preset), **settings})
    out = out or Path("runs") / f"{config.preset}-{config.controller}"
    from gdro_llm.measuring.report import write_report
    from gdro_llm.training.trainer import train

    _quiet()
    train(config, out, resume=resume, fresh=fresh, report=lambda run: write_report([run], run))
    if _processes() == 1 or os.environ["RANK"] == "0":
        _write_report([out], out)


@gdro.command(
    "eval",
    epilog="DIR holds evaluation.json (every number, successes by problem, settings), evaluation.md and .png.",
    params=_settings([key for key in EVALUATION_KEYS if key != "model"], short=True),
)
@click.argument("model", help='model folder, hub name, run directory, or "embedded"')
@click.option("--data", required=True, help="sets, names or files, separated by commas")
@click.option("--out", type=FOLDER, help="folder to write", show_default="runs/eval-NAME, after the model")
def evaluate(model: str, data: str, out: Path | None, **settings: object) -> None:
    r"""Evaluate a model, or the last checkpoint of a run.

    Sample answers to the problems of one or several sets and report mean@n and pass@k, each with a 95 % interval.

      gdro eval embedded --data cells                       the shipped model: a few seconds on any CPU
      gdro eval runs/quickstart-grpo --data cells           a run: its last checkpoint, with its settings
      gdro eval Qwen/Qwen3-1.7B --data math500,aime24 --samples 16 --engine vllm
      gdro eval DIR --data mine.jsonl --grader number --prompt-style plain --template "Question: {problem} Answer:"

    Without a run the settings are those of the data's preset (cells, ladder), or else: 16 answers of up to 4096 tokens,
    math grader, chat prompts (--prompt-style plain for base models) that ask for \boxed{}. Options override either.
    The same command gives the same numbers on the same machine; each set's do not depend on the other sets.
    """
    from gdro_llm.measuring.eval import evaluate_model

    _quiet()
    evaluate_model(model, data, out, **settings)


@gdro.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER, help="run directories")
@click.option("--out", type=FOLDER, help="folder to write", show_default="the last run's")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write an HTML report and PNGs of one or more runs; the first is the baseline."""
    _write_report([*runs], out or runs[-1])


@gdro.command(params=_settings())
@_preset
@click.option("--gpu-memory", type=float, default=80.0, help="of each GPU, in GB of 1e9 bytes", show_default=True)
@click.option("--gpus", type=int, default=1, help="GPUs that share the weights", show_default=True)
def plan_memory(preset: str, gpu_memory: float, gpus: int, **settings: object) -> None:
    """Estimate GPU memory, before anything is loaded.

    Memory of a run by item and phase on each GPU; exit code 2 and remedies where it does not fit.
    """
    from gdro_llm.engine.memory import check_fits, table

    config = Config(**{**load_preset(preset), **settings})
    for name, value in (("--gpu-memory", gpu_memory), ("--gpus", gpus)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} must be above 0 and finite, got {value:g}")
    print(table(config, gpu_memory * 1e9, gpus))
    print(f"fits: {check_fits(config, gpu_memory * 1e9, gpus)}")


@gdro.command(
    epilog="DIR holds comparison.json, .csv (a line a run), .md, .tex, .png, and every run without its weights.",
    params=_settings(),
)
@_preset
@click.option("--methods", default=METHODS, help="the first is the baseline", show_default=True)
@click.option("--seeds", type=int, default=8, help="runs of each method, from --seed on", show_default=True)
@click.option("--models", default="", help="warm starts; seed s starts from number s modulo their number")
@click.option("--jobs", type=int, default=0, help="parallel runs", show_default="one on a GPU, else one per core")
@click.option("--out", type=FOLDER, help="folder to write", show_default="runs/compare-PRESET")
def compare(
    preset: str, methods: str, seeds: int, models: str, jobs: int, out: Path | None, **settings: object
) -> None:
    """Compare methods over seeds, paired, with intervals.

    Train every method with every seed, from the same warm start, on the same prompts, with the same total rollouts, and
    report what the paired differences show. The same command resumes a comparison that was stopped.

      gdro compare quickstart --methods grpo,recommended --seeds 4              a few minutes on two cores
      gdro compare quickstart --methods grpo,null,joint,recommended,mopps,dapo,published-prompt+minibatches=2
      gdro compare smollm2-arith --model DIR --methods grpo,recommended+kappa=1 --validation-problems 100
      gdro compare quickstart --methods grpo,grpo+mean_rollouts=8+batch_size=64       larger groups, same rollouts

    A method is a name, followed by settings, each after a plus: grpo, recommended, null (its plan assigned to random
    prompts), joint, prompt, rollout (joint play, both games or one), joint-null, implicit (uniform rollouts, with the
    weights that joint play's would imply), published-prompt, published-rollout, dr-grpo, dapo (only mixed groups; all
    rollouts count), mopps.

    While a run trains it is evaluated on validation problems; the table is of the test problems, with the last weights
    and with those best on the validation problems. A difference counts as evidence where its 95 % bootstrap interval
    (over warm starts and seeds) and a sign test agree; fewer than six seeds cannot give any.
    """
    from gdro_llm.measuring.compare import compare_preset

    compare_preset(preset, methods, seeds, models, out, jobs, settings)


@gdro.command(params=_settings())
@_preset
@click.option("--methods", default=METHODS, help="which", show_default=True)
@click.option("--warm-up", type=int, default=20, help="batches that controllers learn from", show_default=True)
@click.option("--batches", type=int, default=40, help="batches measured", show_default=True)
@click.option("--components", is_flag=True, help="measure what the gradient is made of instead, on any data")
@click.option("--prompts", type=int, default=128, help="with --components: training prompts", show_default=True)
@click.option("--rollouts", type=int, default=16, help="with --components: rollouts of each", show_default=True)
@click.option("--out", type=FOLDER, default=Path("runs/signal"), help="folder to write", show_default=True)
def signal(
    preset: str,
    methods: str,
    warm_up: int,
    batches: int,
    components: bool,
    prompts: int,
    rollouts: int,
    out: Path,
    **settings: object,
) -> None:
    """Measure signal and noise of one step's gradient, by method, at a fixed policy.

    Signal-to-noise ratio of a batch's gradient, and its cosine with the exact gradients of mean@1 and pass@k, by method
    (as in `gdro compare --help`, without dapo and the published ones) at one policy (--model). Data and grader must be
    such that success probabilities are known (see eval_exact), as of cells.

    With --components, on any data and without methods: the parts of the gradient that are common to all prompts, a
    prompt's own, and noise, with 90 % intervals; by pass rate, how far a prompt's gradient agrees with the mean, and
    the group size that makes most progress per rollout.
    """
    config = Config(**{**load_preset(preset), **settings})
    if components:
        from gdro_llm.measuring import components as measuring

        _quiet()
        print(measuring.table(measuring.measure_components(config, prompts, rollouts, out)))
        print(f"\nfiles: {out}/components.json, .md")
        return
    from gdro_llm.measuring.compare import Method
    from gdro_llm.measuring.signal import measure, table

    print(table(measure(config, [Method.parse(text) for text in methods.split(",")], warm_up, batches, out)))
    print(f"\nfiles: {out}/signal.json, .md")


@gdro.command()
@click.argument("name", required=False, metavar="[PRESET]", help="print this one", shell_complete=_presets)
def presets(name: str | None) -> None:
    """List the presets, or print one with its settings."""
    if name is not None:
        if name not in preset_names():
            raise UsageError(f"no preset {name!r}: choose one of {', '.join(preset_names())}")
        print((PRESETS / f"{name}.toml").read_text(encoding="utf-8"), end="")
        return
    for each in preset_names():
        first = (PRESETS / f"{each}.toml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{each:26s} {first.removeprefix('# ')}")


@gdro.command()
@click.argument("testbed", type=click.Choice(["cells", "cells-shared"]), help="little or strong transfer between cells")
@click.option("--size", type=click.Choice(["0.9M", "3M", "12M"]), default="0.9M", help="parameters", show_default=True)
@click.option("--out", type=FOLDER, default=Path("runs/warm-start"), help="folder to write", show_default=True)
@click.option("--seed", type=int, default=1, help="1 makes the shipped weights", show_default=True)
def warm_start(testbed: str, size: str, out: Path, seed: int) -> None:
    """Make a warm-started tiny model: the shipped one, or others."""
    from gdro_llm.training.warm_start import warm_start

    warm_start(out, seed, testbed=testbed, size=size)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _write_report(runs: list[Path], out: Path) -> None:
    from gdro_llm.measuring.report import summary_table, write_report

    path = write_report(runs, out)
    print(f"\n{summary_table(runs)}\n\nreport: {path}")


if __name__ == "__main__":
    sys.exit(main())
