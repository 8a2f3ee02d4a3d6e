"""How good a compressed backbone is and what it costs.

`cost` is pure arithmetic, `evaluator` and `latency` run a model, `report` writes the result down as
JSON, a Markdown table and a plot. Nothing here imports TensorFlow or seqio, and matplotlib is
imported only while a plot is drawn. The metrics lie beside the tasks, in `data.metrics`.
"""
