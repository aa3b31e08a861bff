"""OpenAI's HTTP interface over one engine; needs the extra ``hrwkv[serve]``."""
