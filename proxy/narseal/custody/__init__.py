"""Where private keys live."""

from narseal.custody.file import FileKey, expand, read_private, write_private

__all__ = ["FileKey", "expand", "read_private", "write_private"]
