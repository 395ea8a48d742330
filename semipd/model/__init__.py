"""Models: specification, loading, layers, the runner that executes a batch."""
