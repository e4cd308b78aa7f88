"""Keys that let a SuperLink know its SuperNodes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_key"]


def write_key(path: str | os.PathLike[str]) -> Path:
    """Make a key pair as ``ssh-keygen -t ecdsa -b 384`` does, unless it is there.

    Args:
        path: where the private key goes, readable by its owner only; the public one gets ``.pub`` after it.

    Returns:
        The public key's path.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = Path(path), Path(f"{path}.pub")
    if private.exists() and public.exists():
        return public
    key = ec.generate_private_key(ec.SECP384R1())  # Flower wants a NIST curve
    private.parent.mkdir(parents=True, exist_ok=True)
    private.unlink(missing_ok=True)
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
    )
    return public
