"""The world as a language model reads it. Imports no torch."""
