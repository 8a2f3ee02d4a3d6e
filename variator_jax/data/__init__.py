"""Tasks and batches: seqio tasks over local documentation, published data sets, the user's files.

Modules that import TensorFlow and seqio are imported by name where they are used; `spec` needs
neither.
"""
