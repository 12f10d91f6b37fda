"""Federated learning on one desk: TFF learning processes with the model, rules, attacks and privacy of live rounds."""
