"""Nothing that a model, a data file or a run folder holds runs as code or steers the terminal; no mistake costs a run.

Elsewhere: pickled weights and code of a model folder (test_policy), pickles under every name that a checkpoint knows
(test_checkpoint), completions in the report (test_report), in the grader's log (test_grading), in the tables of
`gdro eval` (test_eval_command), wrong settings, data and models (test_command_line), full disks and losses that are
not finite (test_checkpoint).
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import literal
import pytest
import torch

import gdro_core
import gdro_llm
import simulations
from gdro_llm.cli import EXTRA, main
from gdro_llm.config import RESUMABLE, Config, UsageError, printable
from gdro_llm.measuring.report import write_report
from gdro_llm.training import checkpoint
from gdro_llm.training.trainer import train

SOURCES = [
    path for package in (gdro_core, gdro_llm, simulations) for path in Path(package.__file__).parent.rglob("*.py")
]
EVIL = "\x1b[2J\x9b31m\u202e<img src=x>"
CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\uffff]|[\u202a-\u202e]")


def trees():
    """Every module of the project, parsed."""
    for path in SOURCES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def flags(config: Config) -> list[str]:
    """What `gdro train quickstart` needs for a configuration."""
    arguments = []
    for spec in fields(Config):
        name, value = f"--{spec.name.replace('_', '-')}", getattr(config, spec.name)
        if isinstance(value, bool):
            arguments.append(name if value else f"--no-{name[2:]}")
        elif spec.name != "preset":
            arguments += [name, str(value)]
    return arguments


# ------------------------------------------------------------------------------------------------------------- code


def test_no_shell_no_pickle_no_code_from_text():
    """No module starts a program, unpickles or evaluates a text; `shlex` only quotes."""
    modules = {"subprocess", "pty", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
    names = {"eval", "exec", "compile", "__import__"}
    attributes = {"system", "popen", "load_module", "unsafe_load"}
    assert len(SOURCES) > 40
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                imported = {(module or alias.name).split(".")[0] for alias in node.names}
                assert not imported & modules, (path, imported)
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name):
                    assert called.id not in names, (path, called.id)
                if isinstance(called, ast.Attribute):
                    owner = called.value.id if isinstance(called.value, ast.Name) else ""
                    assert called.attr not in attributes, (path, called.attr)
                    assert (owner, called.attr) not in {("torch", "load"), ("np", "load")}, path
                    assert not (owner == "os" and re.match(r"exec|spawn|posix_spawn", called.attr)), path
                for keyword in node.keywords:
                    literal_true = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)
                    forbidden = {"shell", "trust_remote_code", "allow_pickle"}
                    assert not (keyword.arg in forbidden and literal_true), (path, keyword.arg)


def test_every_from_pretrained_says_whether_code_may_run():
    """Left open, transformers asks on the terminal, and a "y" typed ahead would answer."""
    calls = 0
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                calls += 1
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, path
    assert calls >= 3


def test_code_of_a_hub_model_does_not_run_for_its_shape(tmp_path):
    """`gdro plan-memory --model NAME` of a model with its own code, in the hub's cache; whoever says yes to all."""
    folder = tmp_path / "hub" / "models--nobody--custom"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "custom_for_test", "auto_map": {"AutoConfig": "custom.CustomConfig"}})
    )
    marker = tmp_path / "ran"
    (snapshot / "custom.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen3Config\n"
        "class CustomConfig(Qwen3Config):\n    model_type = 'custom_for_test'\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-m", "gdro_llm.cli", "plan-memory", "quickstart", "--model", "nobody/custom"]
    process = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "the shape of model 'nobody/custom' is not known" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not marker.exists()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_beside_a_checkpoint_are_not_run_by_any_command(run_config, tmp_path, capsys):
    """Resume, eval and report of a run with pickles under the names that others load; all three work as without."""
    run, marker = tmp_path / "run", tmp_path / "unpickled"
    config = run_config(steps=2, eval_every=2)
    train(config, run)
    torch.save(Bomb(marker), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False)
    assert marker.exists(), "the trap works"
    marker.unlink()
    for folder in (run, run / "checkpoint-000002"):
        for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "rng_state.pth", "adapter_model.bin"):
            (folder / name).write_bytes((tmp_path / "bomb").read_bytes())
        (folder / "state.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    train(config, run, resume=True)
    capsys.readouterr()
    command = ["eval", str(run), "--data", config.test_data, "--out", str(tmp_path / "eval")]
    assert main(command) == 0
    assert main(["report", str(run)]) == 0
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------------- terminal


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.seen = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.seen.add((tag, dict(attrs).get("src", "")[:10]))


def test_what_models_and_data_say_reaches_terminal_and_report_as_text(
    run_config, tiny_model, tmp_path, monkeypatch, capfd
):
    """A vocabulary, ids, levels and subjects full of escape sequences and tags, through train, report and eval.

    And without `log_to` neither tracker is imported.
    """
    for tracker in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, tracker, None)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokens = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {
        name if name.isdigit() or len(name) > 1 or name in "*=" else EVIL + name: i for name, i in vocabulary.items()
    }
    (model / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    config = run_config(model=str(model), steps=1, batch_size=2, eval_samples=2)
    for key in ("data", "test_data"):
        rows = literal.read_log(Path(getattr(config, key)))
        rows = [row | {"id": EVIL + row["id"], "level": EVIL + row["level"], "subject": EVIL} for row in rows]
        rows = [row for row in rows if row["answer"].isdigit()]
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, data=str(tmp_path / "data.jsonl"), test_data=str(tmp_path / "test_data.jsonl"))
    out = tmp_path / "run"
    assert main(["train", "quickstart", "--out", str(out), *flags(config)]) == 0
    assert main(["eval", str(out), "--data", config.test_data, "--out", str(tmp_path / "eval")]) == 0
    printed = "".join(capfd.readouterr())
    assert printable(EVIL) in printed
    assert not CONTROL.search(printed), CONTROL.search(printed)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x&gt;" in page
    assert ("img", "x") not in Tags(out / "report.html").seen


def test_errors_that_quote_a_data_file_are_text_too(tmp_path, capsys, tiny_model):
    """Ids and answers in the one line of a mistake."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": EVIL, "problem": "1+1=", "answer": "2\x1b[2J"}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": EVIL, "problem": "1+2=", "answer": "\x1b[2J{"}) + "\n")
    files = ["--data", str(tmp_path / "train.jsonl"), "--test-data", str(tmp_path / "test.jsonl")]
    small = ["--batch-size", "1", "--minibatches", "1", "--grader", "number", "--model", str(tiny_model)]
    assert main(["train", "quickstart", *files, *small, "--out", str(tmp_path / "out")]) == 2
    refused = capsys.readouterr().err
    assert printable(EVIL) in refused
    assert not CONTROL.search(refused)


def test_printable_leaves_words_and_shows_the_rest():
    """Any script is a word; controls of both kinds, directions and half surrogates are shown."""
    assert printable("3 ± 1 µ 数学 é") == "3 ± 1 µ 数学 é"
    assert printable("\x1b\x9b\r\n\u202e\ud800") == r"\x1b\x9b\r\n\u202e\ud800"


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("phase", ["sample", "update"])
def test_out_of_memory_says_what_to_lower_and_the_run_goes_on_with_it(run_config, tmp_path, monkeypatch, phase):
    """Raised by a layer as CUDA does, in step 4; --resume with the remedy ends the run."""
    config, calls, armed = run_config(), iter(range(10**9)), [True]
    layer = torch.nn.Embedding.forward

    def full(module, tokens):
        if armed[0] and (tmp_path / "run" / "checkpoint-000002").exists():
            training = torch.is_grad_enabled()
            if training == (phase == "update") and next(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return layer(module, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", full)
    with pytest.raises(UsageError) as stopped:
        train(config, tmp_path / "run")
    remedy = r"lower update_tokens \(now 8192\) or sample_rows \(now 1024\), set gradient_checkpointing, and --resume"
    assert re.search(f"out of memory on the GPU: {remedy}: the last checkpoint", str(stopped.value))
    assert checkpoint.verify_checkpoint(tmp_path / "run" / "checkpoint-000002") == ""
    armed[0] = False
    train(replace(config, update_tokens=64, sample_rows=7), tmp_path / "run", resume=True)
    assert [row["step"] for row in literal.read_log(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["update_tokens"] == 64


def test_a_report_that_cannot_be_written_is_one_line_and_costs_nothing(run_config, tmp_path):
    """The folder is a file here; a full disk is the same to the caller."""
    train(run_config(steps=2, eval_every=2), tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"cannot write the report into .*file \(.*`gdro report` makes it again"):
        write_report([tmp_path / "run"], tmp_path / "file")


@pytest.mark.parametrize(("flag", "module"), [("--log-to tensorboard", "tensorboard"), ("--log-to wandb", "wandb")])
def test_a_missing_package_is_found_out_before_the_run_directory_is_made(
    run_config, tmp_path, monkeypatch, capsys, flag, module
):
    """So that the same command works once it is installed."""
    for name in [name for name in sys.modules if module in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    command = ["train", "quickstart", "--out", str(tmp_path / "run"), *flags(run_config()), *flag.split()]
    assert main(command) == 2
    assert f"pip install {module}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- without packages

WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None
sys.argv = ["gdro", *{arguments}]
from gdro_llm.__main__ import main
sys.exit(main())
"""


def without(names, *arguments: str) -> subprocess.CompletedProcess:
    """`gdro` in a process that cannot import some packages."""
    code = WITHOUT.format(names=sorted(names), arguments=list(arguments))
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


PARSING = {"pydantic", "click"}


def test_planning_needs_no_deep_learning():
    """Presets, their memory and the help come with numpy and what parses the command line."""
    listed = without(EXTRA - PARSING, "presets")
    assert listed.returncode == 0, listed.stderr
    planned = without(EXTRA - PARSING, "plan-memory", "qwen3-4b-dapo")
    assert "fits: sample" in planned.stdout, planned.stderr


@pytest.mark.parametrize("package", sorted(PARSING))
def test_without_its_parser_the_command_says_what_to_install(package):
    """One line, exit code 2."""
    result = without([package], "presets")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"gdro: error: the command needs the package {package}: pip install 'gdro[llm]'\n"


@pytest.mark.parametrize(
    "arguments", [("train", "quickstart"), ("eval", "embedded", "--data", "cells"), ("report", "run")]
)
def test_a_command_that_needs_the_extra_says_so_in_one_line(arguments, tmp_path, monkeypatch):
    """And leaves nothing."""
    monkeypatch.chdir(tmp_path)
    process = without(EXTRA - PARSING, *arguments)
    assert process.returncode == 2
    line = rf"gdro: error: {arguments[0]} needs the package \w+: pip install 'gdro\[llm\]'\n"
    assert re.fullmatch(line, process.stderr), process.stderr
    assert process.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_what_pyproject_says():
    """A package that is added there is recognised when it is missing."""
    text = (Path(gdro_llm.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^llm = \[(.*)\]$", text, re.MULTILINE)[1]
    assert {re.match(r"[\w-]+", name)[0].replace("-", "_") for name in re.findall(r'"([^"]+)"', listed)} == EXTRA


# ----------------------------------------------------------------------------------------------------------- options


def test_every_key_is_used():
    """An option that nothing reads is a promise that nobody keeps."""
    read = {
        node.attr
        for path, tree in trees()
        if path.name != "config.py" and "gdro_llm" in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and "config" in ast.unparse(node.value)
    }
    assert {spec.name for spec in fields(Config)} <= read
    assert set(RESUMABLE) <= {spec.name for spec in fields(Config)}
