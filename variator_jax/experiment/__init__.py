"""The paper's experiments: a grid of backbones, tasks, arms, ratios and seeds.

`grid` defines what is compared, `stages` what must be run for it, `preflight` checks it, `drive`
runs it, `score` makes the number of a cell, `measure` times backbones; `results`, `tables`,
`figures` and `report` present the numbers. `neurons`, `similar_tokens` and `truncation` are the
paper's analysis and baselines.
"""
