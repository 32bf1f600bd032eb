"""One training run: from a recipe and its changes to a record.

`config` reads a recipe, `build` makes its data, model and task, `train` runs them, and the run
leaves one record (`records`), which says what was run, where (`setting`, `cost`) and what came out.
"""
