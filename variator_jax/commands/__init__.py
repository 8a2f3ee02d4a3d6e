"""The commands of `variator` and `t5x`: each one a function that turns arguments into calls.

A further command is one function under `@registry.command(...)`; what it does belongs into the
module that it calls.
"""

# In the order of the help.
from variator_jax.commands import runs  # isort: skip
from variator_jax.commands import inspect_commands  # isort: skip
from variator_jax.commands import convert  # isort: skip
from variator_jax.commands import experiment  # isort: skip
from variator_jax.commands import registry

__all__ = ["convert", "experiment", "inspect_commands", "registry", "runs"]
