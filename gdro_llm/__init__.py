"""A GRPO training loop for language models, steered by the controllers of `gdro_core`."""
