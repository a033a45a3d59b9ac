"""The loop: plan, sample, grade, observe, update; checkpoints and evaluation."""
