"""The parts of tools/entitlement.py: a driver of seeded requests, an oracle that knows what each must find, a judge."""
