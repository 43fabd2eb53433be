"""What decides: a language model with a trained top, read as a table."""
