"""The pre-training loop around an engine: checkpoints, metrics, health, distribution."""
