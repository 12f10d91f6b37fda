"""covey_deploy."""
