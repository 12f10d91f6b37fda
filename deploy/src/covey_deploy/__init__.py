"""covey's deployment tools. Each command stands alone; nothing else in covey imports this package."""
