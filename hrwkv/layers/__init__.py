"""The building blocks as ``nn.Module``: tensors in, tensors out; no cache object, no config object."""
