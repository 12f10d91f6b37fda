"""Rollouts of agent releases over a fleet, ring by ring. docs/fleet.md."""
