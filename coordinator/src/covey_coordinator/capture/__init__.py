"""Recording real rounds, with the owners' consent, and attacking them later: `covey capture`, `covey replay`."""
