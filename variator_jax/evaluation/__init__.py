"""How good a compressed backbone is and what it costs.

`evaluate` and `infer` are the commands; `scorers` and `evaluator` run tasks, `schema` and `report`
write the result down as JSON, Markdown and a plot. No TensorFlow and no seqio before a task is
asked for, and matplotlib only while a plot is drawn. Metrics are in `data.spec`.
"""
