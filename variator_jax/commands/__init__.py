"""The commands of `variator` and `t5x`: each one a function that turns arguments into calls.

A further command is one function under `@registry.command(...)`, in `verbs`, `serving` or `bulk`;
what it does belongs into the module that it calls.
"""
