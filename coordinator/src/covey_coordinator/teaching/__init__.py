"""Machine teaching with trusted instances (docs/teaching-mathematics.md)."""
