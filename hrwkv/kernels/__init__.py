"""Pure functions on tensors: recurrences and attention, with no module, no cache and no configuration.

Each operation is a folder: ``naive.py`` is the definition that a reader can trust, the other files are faster
forms of the same function, and ``__init__.py`` checks the arguments and chooses a form by device.
"""
