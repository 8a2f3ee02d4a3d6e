"""`variator bench` and `variator budget`: what an encoder and a distillation step cost.

`arguments` is what was asked, `results` what was measured and how it is written down; `latency`
and `run` measure. Nothing here imports TensorFlow, seqio, T5X or gin; torch and transformers only
if baselines are asked for, matplotlib only while a plot is drawn.
"""
