"""How the policy gets better."""
