"""The T5X engine: plugins trained and run by T5X's own programs. The only package that imports t5x.

gin files name what is here; `docs/t5x.md` shows how they are used. T5X is imported with it.
"""

from variator_jax.t5x_engine.checks import absolute_path, preflight, restore_config
from variator_jax.t5x_engine.model import DistillationModel, model
from variator_jax.t5x_engine.partitioning import partitioner, plan
from variator_jax.t5x_engine.trainer import PluginInitializer, PluginTrainer, get_dataset

__all__ = [
    "DistillationModel", "PluginInitializer", "PluginTrainer", "absolute_path", "get_dataset",
    "model", "partitioner", "plan", "preflight", "restore_config",
]  # fmt: skip
