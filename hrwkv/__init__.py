"""Convert Transformers to hybrids of RWKV-7 and attention layers, distil, evaluate and run them."""
