"""How a stopped update is called. Without NumPy, which the agent's own process does not load."""

STOPPED = "Stopped"  # the kind of a Problem
TOLD = "this device's own privacy policy stopped its update"  # all that a coordinator hears of it
