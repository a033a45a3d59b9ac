"""The language model: weights, sampling, log-probabilities, processes, memory."""
