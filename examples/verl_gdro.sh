#!/bin/sh
# GDRO in verl 0.9.1 on one node: Qwen3-0.6B on GSM8K, 8 rollouts a prompt on average, none or up to 24 for one prompt.
# Data: examples/data_preprocess/gsm8k.py of verl's repository, which numbers the rows as extra_info.index.
export VERL_USE_EXTERNAL_MODULES="${VERL_USE_EXTERNAL_MODULES:-gdro_llm.integrations.verl}"
exec python -m verl.trainer.main_ppo \
  trainer.v1.trainer_mode=gdro_sync \
  +gdro.controller=recommended +gdro.max_rollouts=24 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-0.6B}" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  data.train_files="${DATA:-$HOME/data/gsm8k}/train.parquet" \
  data.val_files="${DATA:-$HOME/data/gsm8k}/test.parquet" \
  data.train_batch_size=128 data.max_prompt_length=512 data.max_response_length=1024 \
  trainer.n_gpus_per_node="${GPUS:-8}" trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=20 \
  trainer.total_epochs=3 'trainer.logger=[console,tensorboard]' "$@"
