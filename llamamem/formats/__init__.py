"""What a sidecar, a checkpoint, a run record and a fixture are: layouts, readers that refuse, writers."""
