"""Tasks and batches: seqio tasks over local documentation or the user's own files.

Modules that import TensorFlow and seqio are imported by name where they are used; `spec`, `corpus`,
`rows` and `noise` need neither.
"""
