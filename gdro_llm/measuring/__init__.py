"""What runs say: report, comparison, evaluation, signal and noise."""
