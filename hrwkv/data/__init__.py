"""Text to packed token batches: documents and their split, passkey documents, packing.

The unit knows text, tokenizers and tensors. It knows no model: losses and stages live in ``distill``,
measurements in ``eval``.
"""
