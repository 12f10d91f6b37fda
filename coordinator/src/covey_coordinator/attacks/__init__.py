"""Attacks: what corrupted devices send, to see what a rule withstands. For simulations; nothing live imports this.

An attack is a frozen value like a rule, its mathematics written once against `aggregation.kernels`, so it runs in
numpy and inside TFF with the same bits. `registry.make_attack` makes one by name; `attacked.Attacked` puts one before a
rule; `covey grid` runs rules against attacks.
"""
