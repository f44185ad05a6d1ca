"""Models: load, save, device choice, attention, loss head, adapters."""
