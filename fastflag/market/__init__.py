"""The world: prices, news and accounts. Imports no torch."""
