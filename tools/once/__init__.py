"""Simulated clients of a gateway, the rules that their memories must follow, and how both are held together."""
