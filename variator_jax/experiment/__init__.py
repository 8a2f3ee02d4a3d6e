"""The paper's experiments: a grid of backbones, tasks, arms, ratios and seeds.

`grid` defines what is compared and what must be run for it, `drive` checks and runs it, `score`
measures cells and backbones; `report` and `figures` present the numbers. `neurons` and
`rivals` are the paper's analysis and the rivals without training.
"""
