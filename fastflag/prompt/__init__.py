"""How the world is told to a language model. Imports no torch."""
