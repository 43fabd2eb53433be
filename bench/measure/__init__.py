"""How something is measured: the clock, the roofline, what is run, and where results are kept."""
