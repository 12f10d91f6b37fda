"""covey_models."""
