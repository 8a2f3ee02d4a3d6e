"""The subcommands of `variator` and `t5x`: each one a function that turns arguments into calls.

A further subcommand is one function under `@command(...)`; what it does belongs into the module
that it calls. Nothing heavy is imported until one runs. The command line itself is `cli.py`.
"""

# In the order in which the help shows them.
from variator_jax.commands import runs# isort: skip
from variator_jax.commands import look# isort: skip
from variator_jax.commands import convert# isort: skip
from variator_jax.commands import experiment# isort: skip
from variator_jax.commands.table import COMMANDS, Command, gin_arguments

__all__ = ["COMMANDS", "Command", "convert", "experiment", "gin_arguments", "look", "runs"]
