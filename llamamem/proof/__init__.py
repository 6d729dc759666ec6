"""Everything that answers "is it really so?": fixture checks, parity, benchmarks, smoke tests."""
