"""Find the data folders that travel with nemobuild: ``engine_configs/`` and ``triton_repo/``.

In a checkout they stand at the top level, where users look for them; in an installed wheel they lie in
``nemobuild/_data``.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Path of ``engine_configs`` or ``triton_repo``. Raises ``FileNotFoundError`` if the installation is broken."""
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"nemobuild is installed without its data folder {name!r}")


def package_folder() -> Path:
    """Folder of the ``nemobuild`` package itself."""
    return _PACKAGE
