"""Coded redundancy (DRACO): where devices share shards, liars are outvoted or located exactly.

The repetition code is a rule, `aggregation.draco`; here is what it asks of a run (`conditions`), and the cyclic code
(`cyclic`). docs/coded-redundancy.md.
"""
