"""The version of the installed package."""

from importlib import metadata


def version() -> str:
    """The version that was installed; ``unknown`` where the sources run uninstalled."""
    try:
        return metadata.version("hrwkv")
    except metadata.PackageNotFoundError:
        return "unknown"
