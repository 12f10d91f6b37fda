"""One self-contained HTML page for an experiment: `html.write_experiment_report`. Numbers: `points`; words: `words`;
drawings: `drawings`. Nothing here imports TensorFlow.
"""
