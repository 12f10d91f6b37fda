"""`python -m covey_edge` is the `covey` command."""

from covey_edge.cli import main

main()
