"""``python -m hrwkv.cli``, which is what torchrun starts."""

import sys

from hrwkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
