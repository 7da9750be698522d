"""The version of transformers that is needed, checked before anything is imported of it."""

from __future__ import annotations

from importlib import metadata

_LEAST = "5.24"
_INSTALL = "pip install 'torchmoe[transformers]'"


def check() -> None:
    """Passes where a new enough transformers is installed.

    Raises:
        ImportError: it or packaging is missing, or it is too old.
    """
    required = f"torchmoe.integrations.transformers: transformers must be {_LEAST} or later"
    try:
        from packaging.version import Version

        installed = metadata.version("transformers")
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        raise ImportError(f"{required}, got none; {_INSTALL} installs it ({error})") from error
    # A development version of a release has what the release has.
    if Version(Version(installed).base_version) < Version(_LEAST):
        raise ImportError(f"{required}, got {installed}; {_INSTALL} installs it")
