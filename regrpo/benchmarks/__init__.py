"""Public benchmarks: reading them, running a model on them, scoring."""
