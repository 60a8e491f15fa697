"""Others' evaluation harnesses, run on a steered model: lm-evaluation-harness and Inspect AI, a file each."""
