"""covey_coordinator."""
