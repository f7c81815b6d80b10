"""Narseal's own Sigstore signatures: made in batches, given out as bundles."""
