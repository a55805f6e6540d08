"""One file a stage: wires the parts together."""
