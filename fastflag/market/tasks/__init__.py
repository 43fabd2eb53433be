"""What may be done in a market and what it earns: a task a file."""
