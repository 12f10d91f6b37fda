"""Learning algorithms that need more than one aggregate of updates per round: Federated SVRG and SCAFFOLD."""
