"""The best recipe for a model, found on that model."""
