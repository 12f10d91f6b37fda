"""What an operator sees of a run: live on a terminal, as metrics, as log lines, and afterwards from the store.

A coordinator tells what happens as `events` to whoever watches; nothing here decides anything or reaches back into it.
"""
