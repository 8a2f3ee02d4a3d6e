"""The paper's experiments: a grid of backbones, tasks, arms, ratios and seeds.

`grid` defines what is compared and what must be run for it, `drive` checks and runs it, `score`
measures cells, backbones and neurons; `report`, `paired` and `figures` present the numbers.
`rivals` is the arms that need no training.
"""
