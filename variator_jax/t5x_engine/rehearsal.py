"""What can be told of a T5X run before T5X starts: its model, its task, its checkpoint.

T5X's programs would raise the same errors later, in the midst of their own.
"""

from __future__ import annotations

from t5x import models

from variator_jax.data.batches import task_or_mixture
from variator_jax.t5x_engine.model import DistillationModel


def rehearse(*, model: DistillationModel, task: str | None = None) -> models.BaseModel:
    """Makes the model and looks the task up. gin has called what makes them.

    Raises:
      VariatorError: for a task that is not registered, files that cannot be read, or settings that
        do not go together.
    """
    if task is not None:
        task_or_mixture(task)
    return model
