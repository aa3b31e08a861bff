"""Generation for many requests at once: continuous batching over one model and one cache."""
