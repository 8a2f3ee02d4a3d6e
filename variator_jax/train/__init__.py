"""Distillation and the built-in engine: losses, the step, the training loop, entry points."""
