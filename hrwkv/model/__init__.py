"""The hybrid model: its config, its memory, its one forward, its files, and its border to Transformers."""
