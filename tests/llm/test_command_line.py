"""Configuration and command line: a mistake is one line on stderr that names the thing and the remedy, exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import gdro_llm
from gdro_llm.cli import main
from gdro_llm.config import (
    CONTROLLERS,
    EVALUATION_KEYS,
    OPTIONS,
    PRESETS,
    RESUMABLE,
    SHARED,
    TYPES,
    Config,
    UsageError,
    load_preset,
    named_as_now,
    preset_names,
)

GOOD = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(10)]
HELD_OUT = [{"problem": f"{i}+2=", "answer": str(i + 2)} for i in range(4)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def refused(tmp_path, tiny_model, capsys):
    """Run `gdro train` with a .toml file, data files and flags that hold a mistake; the text of its one error line."""

    def run(*flags: str, toml: str = "", train=GOOD, test=HELD_OUT, model=tiny_model) -> str:
        for name, rows in (("train", train), ("test", test)):
            content = rows if isinstance(rows, bytes) else (rows if isinstance(rows, str) else lines(rows)).encode()
            (tmp_path / f"{name}.jsonl").write_bytes(content)
        (tmp_path / "mine.toml").write_text(f"steps = 1\nbatch_size = 4\nthreads = 1\n{toml}\n", encoding="utf-8")
        data = ["--data", str(tmp_path / "train.jsonl"), "--test-data", str(tmp_path / "test.jsonl")]
        command = ["train", str(tmp_path / "mine.toml"), "--model", str(model), "--out", str(tmp_path / "out"), *data]
        capsys.readouterr()
        assert main([*command, *flags]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("gdro: error: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert not (tmp_path / "out").exists(), "a mistake leaves no run directory"
        return captured.err

    return run


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "learning_rat = 0.1",
            r"mine.toml has the unknown key 'learning_rat'; did you mean 'learning_rate'\? `gdro tra",
        ),
        ("zzz = 0.1", r"mine.toml has the unknown key 'zzz'; `gdro train --help` lists the keys"),
        ("adversary = 'cvar'\ncvar_alpha = 0", r"cvar_alpha must lie in \(0, 1\], got 0.0"),
        ("adversary = 'chi-square'\nchi_square_rho = -1", r"chi_square_rho must be at least 0.0, got -1.0"),
        ("preset = 'x'", r"unknown key 'preset'"),
        ("minibatches = '2'", r"mine.toml: minibatches must be a whole number, got '2'"),
        ("minibatches = 2.0", r"minibatches must be a whole number, got 2.0"),
        ("scale_rewards = 1", r"scale_rewards must be true or false, got 1"),
        ("temperature = true", r"temperature must be a number, got True"),
        ("[model]\nname = 'x'", r"model must be a text, got \{'name': 'x'\}"),
        ("temperature = nan", r"temperature must be a finite number, got nan"),
        ("learning_rate = inf", r"learning_rate must be a finite number, got inf"),
        ("weight_decay = nan", r"weight_decay must be a finite number, got nan"),
        ("clip_low = nan", r"clip_low must be a finite number, got nan"),
        ("adam_beta2 = 1", r"adam_beta2 must be below 1, got 1.0"),
        ("seed = 4294967296", r"seed must be below 2\*\*32, got 4294967296"),
        ("temperature = 0", r"temperature must be above 0, got 0.0"),
        ("clip_high = -0.1", r"clip_high must be at least 0.0, got -0.1"),
        ("min_rollouts = 5", r"min_rollouts <= mean_rollouts <= max_rollouts, got 5 <= 4 <= 12"),
        ("min_rollouts = 9\nmax_rollouts = 3", r"got 9 <= 4 <= 3"),
        ("max_rollouts = 3", r"got 0 <= 4 <= 3"),
        ("mean_rollouts = 1\nmin_rollouts = 1", r"mean_rollouts must be at least 2, got 1"),
        ("thinking = true", r"thinking must be off with prompt_style 'plain'"),
        ("minibatches = 3", r"minibatches must divide batch_size = 4, got 3"),
        ("controller = 'ppo'", r"controller must be one of grpo, recommended,.*got 'ppo'"),
        ("dtype = 'float16'", r"dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("template = 'Q:'", r"template must contain \{problem\}, got 'Q:'"),
        ("steps 3", r"mine.toml is not valid TOML"),
        ("trainable_layers = 3", r"trainable_layers must be at most 2, got 3"),
        ("stop = 'the'", r"stop must be held by some token of the model, got 'the'"),
        ("importance_cap = 0.5", r"importance_cap must be 0 .off. or at least 1, got 0.5"),
        ("loss = 'cispo'\ncontroller = 'published-prompt'", r"loss must not be 'cispo' with a published controller"),
        ("preserve_objective = true", r"preserve_objective needs aggregation 'prompt', got 'rollout'"),
        (
            "aggregation = 'prompt'\npreserve_objective = true\nkl_coef = 0.1",
            r"preserve_objective needs kl_coef 0.0, got 0.1",
        ),
        ("aggregation = 'prompt'\npreserve_objective = true\npasses = 2", r"preserve_objective needs passes 1, got 2"),
        (
            "aggregation = 'prompt'\npreserve_objective = true\nscale_rewards = false",
            r"preserve_objective needs scale_rewards True, got False",
        ),
        (
            "aggregation = 'prompt'\npreserve_objective = true\ncontroller = 'grpo'",
            r"preserve_objective must be off with controller 'grpo'",
        ),
        ("lora_rank = 2\ntrainable_layers = 1", r"trainable_layers must be 0 with lora_rank"),
        ("overlong = 'punish'", r"overlong_buffer must be above 0 and below max_new_tokens .*got 0 with 'punish'"),
        ("eval_top_p = 1.5", r"eval_top_p must lie in \(0, 1\], got 1.5"),
        ("log_to = 'mlflow'", r"log_to must name tensorboard, wandb or both, got 'mlflow'"),
        ("max_prompt_tokens = 2", r"only 0 of 10 problems have prompts of at most max_prompt_tokens = 2"),
        ("grader = 'number'\nprompt_style = 'chat'", r"prompt_style 'chat' needs a chat template"),
        ("device = 'cuda'", r"device is 'cuda', but torch finds no GPU; use --device cpu"),
    ],
)
def test_a_wrong_setting_is_named(refused, toml, message, monkeypatch):
    """Unknown keys, wrong types, values outside of their range, NaN, contradictions."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert re.search(message, refused(toml=toml))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": [*GOOD[:1], {"problem": "1+1="}]}, r"train.jsonl, line 2: needs an 'answer'"),
        ({"train": [{"problem": "1+1=", "answer": " "}]}, r"line 1: needs an 'answer'"),
        ({"train": [{"problem": "1+1=", "answer": None}]}, r"line 1: needs an 'answer'"),
        ({"train": [{"problem": "1+1=", "answer": []}]}, r"line 1: needs an 'answer'"),
        ({"train": '{"problem": "1+1=", "answer": NaN}'}, r"line 1: not JSON \(NaN"),
        ({"train": [{"problem": None, "answer": "2"}]}, r"line 1: needs a JSON object with a text 'problem'"),
        ({"train": [{"answer": "2"}]}, r"line 1: needs a JSON object with a text 'problem'"),
        ({"train": "[1, 2]\n"}, r"line 1: needs a JSON object"),
        ({"train": lines(GOOD[:2]) + '{"problem": "a'}, r"train.jsonl, line 3: not JSON"),
        ({"train": b'{"problem": "\xff", "answer": "1"}'}, r"line 1: not JSON"),
        ({"train": [{"id": "a", **row} for row in GOOD]}, r"line 2: the id 'a' occurs twice; ids must be unique"),
        ({"train": [*GOOD, GOOD[0]]}, r"line 11: the id 'train/\w+' occurs twice"),
        ({"train": "\n\n"}, r"train.jsonl holds no problems"),
        (
            {"train": [*GOOD, {"id": "x", "problem": "Tom has 3", "answer": "3"}]},
            r"has no tokens for some characters of 'x' \('Tom has 3'\); --model takes",
        ),
        ({"test": ""}, r"test.jsonl holds no problems"),
        ({"train": GOOD[:3]}, r"batch_size must be at most the 3 problems of .*train.jsonl, got 4"),
        (
            {"test": [*HELD_OUT, GOOD[3]]},
            r"1 problems of test_data occur in data too, for example '3\+1='; remove them",
        ),
    ],
)
def test_a_mistake_in_a_data_file_is_named_with_its_line(refused, files, message):
    """Missing answers and problems, broken lines, repeated ids, leaks between the splits."""
    assert re.search(message, refused(**files))


def test_missing_files_and_flags_are_named(refused, tmp_path, capsys):
    """No such data, no test data, no such preset, an --out that cannot be."""
    assert "no data file" in refused("--data", str(tmp_path / "none.jsonl"))
    assert "test_data must name held-out problems" in refused("--test-data", "")
    for name in ("quickstrat", str(tmp_path / "none.toml")):
        assert main(["train", name]) == 2
        message = capsys.readouterr().err
        assert f"no preset {name!r}: choose one of {', '.join(preset_names())}, or give a .toml file" in message
    (tmp_path / "file").write_text("x")
    assert "cannot make the run directory" in refused("--out", str(tmp_path / "file" / "run"))
    assert "choose another --out" in refused("--out", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "has no config.json|cannot load model"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "has no config.json; give a Hugging Face folder or a hub name",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot load model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model"),
        (lambda folder: (folder / "model.safetensors").write_text("PK"), "cannot load model"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer files"),
    ],
    ids=["no-folder", "no-config", "empty-config", "broken-config", "no-weights", "broken-weights", "no-tokenizer"],
)
def test_a_model_folder_that_cannot_be_loaded_is_named(refused, tmp_path, tiny_model, spoil, message):
    """Absent or broken parts; nothing is replaced by random weights or an empty vocabulary."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    spoil(folder)
    error = refused(model=folder)
    assert re.search(message, error)
    assert str(folder) in error


def test_missing_weights_are_an_error_and_not_random_numbers(refused, tmp_path, tiny_model):
    """Transformers would initialise them with a warning only."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights, for example model.norm.weight" in refused(model=folder)


def test_a_hub_name_out_of_reach_is_one_line(tmp_path):
    """In a process of its own: no traceback, no warnings of the libraries around it."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = ["train", "quickstart", "--model", "nobody/nothing", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-m", "gdro_llm.cli", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith("gdro: error: cannot load model 'nobody/nothing'")
    assert "--model takes a folder" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_load(name):
    """And hold a valid configuration that says where it came from."""
    config = Config(**load_preset(name))
    assert config.preset == name
    assert json.loads(config.to_json())["preset"] == name


def test_presets_come_before_defaults_and_flags_before_presets(tmp_path, monkeypatch):
    """`gdro train p.toml --seed 3` is the defaults, then p, then the flags; whole numbers serve as floats."""
    calls = []
    monkeypatch.setattr(
        "gdro_llm.training.trainer.train", lambda config, out, **flags: calls.append((config, out, flags))
    )
    monkeypatch.setattr("gdro_llm.cli._write_report", lambda *arguments: None)
    (tmp_path / "p.toml").write_text("seed = 2\ntemperature = 2\nmean_rollouts = 5\nscale_rewards = false\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "p.toml", "--seed", "3", "--controller", "grpo", "--resume"]) == 0
    config, out, flags = calls[0]
    assert config == Config(
        preset="p", seed=3, temperature=2.0, mean_rollouts=5, scale_rewards=False, controller="grpo"
    )
    assert type(config.temperature) is float
    assert str(out) == os.path.join("runs", "p-grpo")
    assert callable(flags.pop("report"))
    assert flags == {"resume": True, "fresh": False}


def test_the_help_names_every_key_preset_and_controller(capsys):
    """And prints: no stray % in a help text."""
    assert main(["train", "--help"]) == 0
    text = re.sub(r"-\n\s+", "-", capsys.readouterr().out)  # a name may go on in the next line
    for spec in fields(Config):
        if spec.name != "preset":
            assert f"--{spec.name.replace('_', '-')}" in text
    for name in (*preset_names(), *CONTROLLERS):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing command; see gdro --help"),
        (["trian"], "no such command 'trian'. Did you mean 'train'? see gdro --help"),
        (["train"], "missing argument 'PRESET'; see gdro train --help"),
        (["train", "quickstart", "--sed", "1"], "no such option '--sed'. (Did you mean one of: '--passes', '--seed', "),
        (
            ["train", "quickstart", "--seed", "one"],
            "invalid value for '--seed': 'one' is not a valid integer; see gdro",
        ),
        (
            ["train", "quickstart", "--controller", "ppo"],
            "invalid value for '--controller': 'ppo' is not one of 'grpo', ",
        ),
        (["train", "quickstart", "--resume", "--fresh"], "--fresh is not allowed with --resume; see gdro train --help"),
        (["train", "quickstart", "--steps"], "option '--steps' requires an argument; see gdro train --help"),
        (["train", "quickstart", "more"], "got unexpected extra argument (more); see gdro train --help"),
        (["train", "no-preset", "--help"], "no preset 'no-preset': choose one of quickstart, "),
        (
            ["warm-start"],
            "missing argument '{cells|cells-shared}'. Choose from: cells, cells-shared; see gdro warm-start",
        ),
        (["eval", "embedded"], "missing option '--data'; see gdro eval --help"),
        (["report"], "missing argument 'RUNS...'; see gdro report --help"),
    ],
)
def test_what_the_command_line_refuses_is_one_line_with_code_2(arguments, message, capsys):
    """Unknown words with near ones, wrong types and choices, absent and surplus arguments, --resume with --fresh."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gdro: error: {message}"), captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_flag_is_not_abbreviated(capsys):
    """`--reward` could mean `--reward-noise` today and another flag tomorrow."""
    assert main(["train", "quickstart", "--reward", "0.1"]) == 2
    assert "no such option '--reward'. (Did you mean one of: '--reward-noise', " in capsys.readouterr().err


def defaults_in(text: str) -> dict[str, str]:
    """Flags of a help text and the defaults that it shows."""
    words = " ".join(text.split())
    return dict(re.findall(r" --([a-z0-9-]+) (?:(?! --[a-z]).)*?\[default: ([^\]]*)\]", words))


def test_the_help_of_a_preset_shows_its_values(tmp_path, capsys):
    """By name or .toml file, wherever --help stands; without one the defaults of `Config`."""
    assert main(["train", "--help"]) == 0
    shown = defaults_in(capsys.readouterr().out)
    assert {"steps": "80", "eval-samples": "8", "grader": "exact"}.items() <= shown.items()
    assert not {"log-to", "test-data"} & shown.keys()
    config = Config(**load_preset("smollm2-arith"))
    for arguments in (["smollm2-arith", "--help"], ["-h", "smollm2-arith"], ["--seed", "3", "smollm2-arith", "--help"]):
        assert main(["train", *arguments]) == 0
        shown = defaults_in(capsys.readouterr().out)
        for key in ("steps", "batch_size", "max_new_tokens", "learning_rate", "grader", "data"):
            assert shown[key.replace("_", "-")] == str(getattr(config, key)), key
    file = tmp_path / "mine.toml"
    file.write_text('steps = 7\nthinking = true\nprompt_style = "chat"\ntemplate = "{problem}\\n?"\n', encoding="utf-8")
    for command in ("train", "plan-memory", "compare", "signal"):
        assert main([command, str(file), "--help"]) == 0
        text = capsys.readouterr().out
        shown = defaults_in(text)
        assert (shown["steps"], shown["prompt-style"], shown["template"]) == ("7", "chat", r"{problem}\n?")
        assert re.search(r"--thinking / --no-thinking\s[^\[]*\[default:\s+on\]", text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"train", "eval", "compare", "presets"}),
        ("train q", {name for name in preset_names() if name.startswith("q")}),
        ("train my", {"my"}),  # of the kind "file", which the shell completes
        ("presets smol", {"smollm2-arith"}),
        ("train quickstart --learning", {"--learning-rate"}),
        ("train quickstart --controller joint-", {"joint-prompt", "joint-rollout", "joint-null"}),
        ("train quickstart --no-sc", {"--no-scale-rewards"}),
        ("eval embedded --top", {"--top-p", "--top-k"}),
    ],
)
def test_shells_complete_commands_presets_flags_and_choices(words, expected, monkeypatch, capsys):
    """As bash asks: the words of the line, and which one is incomplete."""
    monkeypatch.setenv("_GDRO_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"gdro {words}")
    monkeypatch.setenv("COMP_CWORD", str(f"gdro {words}".count(" ")))
    assert main([]) == 0
    words_offered = {row.partition(",")[2] for row in capsys.readouterr().out.splitlines()}
    assert words_offered == expected if words else words_offered > expected


def test_the_help_says_how_shells_complete(monkeypatch, capsys):
    """And what it names is a script for the shell."""
    assert main(["--help"]) == 0
    assert 'eval "$(_GDRO_COMPLETE=bash_source gdro)"' in capsys.readouterr().out
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_GDRO_COMPLETE", f"{shell}_source")
        assert main([]) == 0
        assert f"_GDRO_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        "import gdro_llm; assert {*gdro_llm.__all__} <= {*dir(gdro_llm)}",
        "from gdro_llm import Config, UsageError, load_preset; Config(**load_preset('quickstart'))",
        "from gdro_llm.cli import main; assert main(['--help']) == 0",
        "from gdro_llm.cli import main; assert main(['train', 'quickstart', '--help']) == 0",
        "from gdro_llm.cli import main; assert main(['presets']) == 0",
    ],
)
def test_what_needs_no_torch_does_not_load_it(code):
    """In a process of its own; nor transformers or matplotlib."""
    code += "\nimport sys; assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_the_lines_of_the_readme_train_and_report(tmp_path, monkeypatch):
    """As they stand, but for a smaller run."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n([^`]*from gdro_llm import[^`]*)```", readme)
    small = (
        '"steps": 1, "batch_size": 8, "minibatches": 1, "test_problems": 8, "threads": 1, "device": "cpu", "seed": 1'
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.replace('"seed": 1', small), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "checkpoint-000001").is_dir()
    assert "grpo" in (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")


def test_the_package_offers_its_functions():
    """The same objects as in the modules that hold them, each with a docstring; other names are an error."""
    from gdro_llm.measuring.compare import compare
    from gdro_llm.measuring.eval import evaluate_model
    from gdro_llm.measuring.report import write_report
    from gdro_llm.training.trainer import train

    offered = [getattr(gdro_llm, name) for name in sorted(gdro_llm.__all__)]
    assert offered == [Config, UsageError, compare, evaluate_model, load_preset, train, write_report]
    for name, value in zip(sorted(gdro_llm.__all__), offered, strict=True):
        assert value.__doc__
        assert re.search(rf"^    {name} ", gdro_llm.__doc__, re.MULTILINE)
    with pytest.raises(AttributeError, match="module 'gdro_llm' has no attribute 'tain'"):
        gdro_llm.tain  # noqa: B018


def test_report_of_what_is_no_run_is_refused(tmp_path, capsys):
    """One line, exit code 2."""
    assert main(["report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gdro: error: ")
    assert message.count("\n") == 1


def test_presets_lists_every_preset(capsys):
    """One line each; by name, with its settings."""
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == preset_names()
    for name, line in zip(preset_names(), listed, strict=True):
        assert main(["presets", name]) == 0
        text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
        assert capsys.readouterr().out == text
        assert text.startswith(f"# {line.split(maxsplit=1)[1]}\n")
    assert main(["presets", "no-such"]) == 2
    assert "no preset 'no-such': choose one of quickstart, " in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind is float])
def test_no_float_setting_takes_nan(name):
    """NaN passes every comparison written the wrong way round."""
    with pytest.raises(UsageError, match=f"{name} must be a finite number, got nan"):
        Config(**{name: float("nan")})


@pytest.mark.parametrize("name", [name for name, spec in OPTIONS.items() if {"ge", "gt", "le", "lt"} & spec.keys()])
def test_a_bound_holds_however_a_configuration_is_made(name):
    """The bounds at the field, by keyword and by `replace`: what lies beyond is refused with its name and value."""
    spec, kind = OPTIONS[name], TYPES[name]
    beyond = [kind(spec[key] + sign) for key, sign in (("ge", -1), ("le", 1)) if key in spec]
    beyond += [kind(spec[key]) for key in ("gt", "lt") if key in spec]
    for value in beyond:
        for make in (Config, partial(replace, Config())):
            with pytest.raises(UsageError, match=rf"^{name} must (be|lie) .*, got {re.escape(repr(value))}$"):
                make(**{name: value})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_has_the_type_of_its_option(name):
    """A whole number is a number, but 1 is not true nor true 1, no text is parsed, and nothing can be changed."""
    wrong = {int: [True, 1.0, "1", None], float: [True, "1", None], bool: [1, 0.0, "true", None], str: [1, b"x", None]}
    for value in wrong[TYPES[name]]:
        if value is getattr(Config, name):  # unset
            continue
        with pytest.raises(UsageError, match=rf"^{name} must be (a|true) .*, got {re.escape(repr(value))}$"):
            Config(**{name: value})
    with pytest.raises(FrozenInstanceError):
        setattr(Config(), name, getattr(Config(), name))
    assert type(Config(temperature=2).temperature) is float


def test_an_unknown_key_is_named_with_a_near_one():
    """By keyword, as in a file."""
    with pytest.raises(UsageError, match=r"^Config has the unknown key 'lerning_rate'; did you mean 'learning_rate'\?"):
        Config(lerning_rate=1.0)


def test_what_is_declared_at_a_field_is_what_runs_rely_on():
    """Keys of evaluations in the order of evaluation.json; what a resumed run may change; what methods share."""
    assert " ".join(EVALUATION_KEYS) == (
        "seed model dtype trust_remote_code device threads prompt_style thinking template grader grade_seconds "
        "grade_workers test_problems engine vllm_memory max_new_tokens eval_samples eval_temperature eval_top_p "
        "eval_top_k stop sample_rows"
    )
    memory = {"gradient_checkpointing", "vllm_memory", "sample_rows", "update_tokens"}
    assert set(RESUMABLE) == {"device", "threads", "grade_workers", "max_sampler_gap", "log_to"} | memory
    data = {name for name, spec in OPTIONS.items() if spec["group"] == "data"} - {"reward_noise"}
    evaluations = {name for name in OPTIONS if name.startswith("eval_")}
    assert set(SHARED) == {"seed", "model", "max_new_tokens", "stop"} | data | evaluations


@pytest.mark.parametrize(
    ("dial", "value", "adversary", "others"),
    [
        ("adversary_step", 1.0, "entropic", ("cvar", "chi-square")),
        ("cvar_alpha", 0.2, "cvar", ("entropic", "chi-square")),
        ("chi_square_rho", 1.0, "chi-square", ("entropic", "cvar")),
    ],
)
def test_a_dial_is_refused_where_it_changes_nothing(dial, value, adversary, others):
    """With another adversary, and with a controller that has none."""
    assert getattr(Config(adversary=adversary, **{dial: value}), dial) == value
    for other in others:
        with pytest.raises(UsageError, match=f"^{dial} changes nothing with adversary '{other}'$"):
            Config(adversary=other, **{dial: value})
    for controller in ("grpo", "mopps", "published-prompt", "joint-rollout", "implicit-rollout"):
        with pytest.raises(UsageError, match=f"changes nothing with controller '{controller}'$"):
            Config(adversary=adversary, controller=controller, **{dial: value})


def test_an_absent_key_of_an_earlier_run_has_its_default():
    """A config.json of a version without the key; what may change in a resumed run is no conflict."""
    before = json.loads(Config().to_json())
    del before["cvar_alpha"], before["chi_square_rho"]
    assert Config(threads=2, log_to="wandb").conflicts(before) == {}
    differing = Config(adversary="cvar", cvar_alpha=0.2, seed=1).conflicts(before)
    assert differing == {"seed": (0, 1), "adversary": ("entropic", "cvar"), "cvar_alpha": (0.5, 0.2)}


FRONTIER = ("candidates", "kappa", "measure_every", "verifier_error")


def before_kappa(controller: str, **settings) -> dict[str, Any]:
    """A config.json of a version without a kappa, in which defaults were written out."""
    saved = json.loads(Config().to_json()) | {"controller": controller, "min_rollouts": 2, "adversary_step": 2.0}
    return {key: value for key, value in (saved | settings).items() if key not in FRONTIER}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("recommended", "joint"),
        ("recommended-prompt", "joint-prompt"),
        ("recommended-rollout", "joint-rollout"),
        ("null", "joint-null"),
        *((name, name) for name in ("grpo", "mopps", "implicit", "implicit-rollout", "published-prompt")),
    ],
)
def test_controllers_of_earlier_runs_have_their_present_names(earlier, now):
    """`recommended` was joint play until there was a kappa: such a run goes on as that, and as nothing else."""
    saved = before_kappa(earlier)
    assert named_as_now(saved) == saved | {"controller": now}
    assert named_as_now(named_as_now(saved)) == named_as_now(saved)
    assert Config(controller=now).conflicts(saved) == {}
    other = "recommended" if now != "mopps" else "joint"
    assert Config(controller=other).conflicts(saved)["controller"] == (now, other)


def test_controllers_of_present_runs_keep_their_names():
    for controller in CONTROLLERS:
        settings = {"controller": controller, "aggregation": "prompt"}
        saved = json.loads(Config(**settings).to_json())
        assert named_as_now(saved) == saved
        assert Config(**settings).conflicts(saved) == {}


def test_zero_of_an_earlier_run_was_a_zero():
    """Joint play with prompts passed over, or without an adversary, cannot go on: 0 now means the own default."""
    saved = before_kappa("recommended", min_rollouts=0, adversary_step=0.0, utility="mixed")
    differing = Config(controller="joint", utility="mixed").conflicts(saved)
    assert differing == {"min_rollouts": (0, 2), "adversary_step": (0.0, 2.0)}


def test_settings_without_effect_are_no_conflict():
    """Those that the controller does not look at; with another controller, all that differ are named."""
    saved = json.loads(Config(controller="recommended").to_json())
    assert Config(controller="recommended").conflicts(saved | {"utility": "hit"}) == {}
    assert Config(controller="recommended").conflicts(saved | {"kappa": 1.0}) == {"kappa": (1.0, 0.5)}
    joint = json.loads(Config(controller="joint").to_json())
    assert Config(controller="joint").conflicts(joint | dict.fromkeys(FRONTIER, 3)) == {}
    differing = Config(controller="joint", utility="hit").conflicts(saved | {"kappa": 1.0})
    assert differing["controller"] == ("recommended", "joint")
    assert {"utility", "kappa"} < differing.keys()
