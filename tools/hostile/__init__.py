"""The files of tests/data/hostile/: each a small sound sidecar with one fault."""
