"""`variator bench`: what an encoder and a distillation step cost in time and memory, on one device.

`settings` is what was asked, `results` what was measured, as data; `encoder`, `peers` and
`train_step` measure; `tables` and `plot` write it down; `run` puts them together. Weights are
random, for the clock does not see them. Nothing here imports TensorFlow, seqio, T5X or gin; torch
and transformers only if peers are asked for, matplotlib only while a plot is drawn.
"""
