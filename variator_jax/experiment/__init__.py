"""The paper's experiments: a grid of backbones, tasks, arms, ratios and seeds.

`grid` says what there is, `stages` what must be run, `drive` runs it, `score` makes a cell's
number; `results`, `tables`, `figures` and `report` make what a reader sees.
"""
