"""Signatures of objects in the form of OpenSSF Model Signing, with a key of one's own and without a network.

The signature covers the object's folder, so `model_signing verify key` checks it without nemobuild too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemobuild.errors import IntegrityError, ToolchainError, UsageError
from nemobuild.store.objects import Store


def sign(store: Store, stage: str, key: str, private_key: Path) -> Path:
    """Sign an object, once verified, with an elliptic-curve key in PEM. Returns the file of the signature."""
    signing = _library("signing")
    signature = store.signature_file(stage, key)
    store.verify(stage, key)
    try:
        signing.Config().use_elliptic_key_signer(private_key=_present(private_key)).sign(
            store.path(stage, key), signature
        )
    except (ValueError, TypeError, OSError) as error:
        raise UsageError("bad-signing-key", f"{private_key} could not sign.", why=f"{error}.") from error
    return signature


def verify(store: Store, stage: str, key: str, public_key: Path) -> None:
    """Raise ``IntegrityError`` unless the object is signed, as it is, with the other half of ``public_key``."""
    verifying = _library("verifying")
    signature, folder = store.signature_file(stage, key), store.path(stage, key)
    if not signature.is_file():
        raise IntegrityError("not-signed", f"The {stage} {key[:12]} is not signed.", next="Sign it: `store sign`.")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=_present(public_key))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError("bad-signing-key", f"{public_key} is not a public key.", why=f"{error}.") from error
    try:
        verifier.verify(folder, signature)
    except Exception as error:  # what the library raises is not of one kind
        raise IntegrityError(
            "bad-signature",
            f"The signature of the {stage} {key[:12]} does not hold.",
            why=f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            next="It was changed, or signed with another key.",
        ) from error


def _library(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise ToolchainError(
            "no-signing",
            "Signatures need the package model-signing.",
            why=f"{error}.",
            next="Install it with: pip install 'nemobuild[signing]'",
        ) from error


def _present(key: Path) -> Path:
    if not key.is_file():
        raise UsageError("bad-path", f"There is no key {key}.")
    return key
