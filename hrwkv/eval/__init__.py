"""What a model kept: perplexity, KL and agreement with its teacher, retrieval, memory, and the report of it.

Measurements take models, batches and a ``generate`` function, and give plain values. Who generates (this
package's engine, Transformers, an HTTP client) is the caller's choice, so this unit knows none of them.
"""
