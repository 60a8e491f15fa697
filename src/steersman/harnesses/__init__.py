"""Others' evaluation harnesses, run on a steered model: lm-evaluation-harness and Inspect AI, a file each.

`lm_eval`, `inspect_registry` and `inspect_model` extend classes of these libraries, so that they are imported
only by them (entry points) and by who has them; the other files need neither.
"""
