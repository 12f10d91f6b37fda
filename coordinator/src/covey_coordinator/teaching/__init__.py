"""Machine teaching with trusted instances (docs/machine-teaching.md)."""
