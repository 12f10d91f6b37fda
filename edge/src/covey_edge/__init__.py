"""covey_edge."""
