"""One self-contained HTML page for a demo: `html.write_report`. Numbers: `summary`; drawings: `plots`.

Nothing here imports TensorFlow, and the terminal's table (`summary.table_lines`) needs NumPy only.
"""
