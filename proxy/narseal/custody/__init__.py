"""Where private keys live."""

from narseal.custody.file import FileKey, write_private

__all__ = ["FileKey", "write_private"]
