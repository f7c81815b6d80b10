"""What the tests of custody share."""

from tests.real.sigstore.conftest import cosign

__all__ = ["cosign"]
