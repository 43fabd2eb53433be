"""How all of it is measured, and against whom: each module here is a command."""
