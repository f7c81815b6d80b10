"""What uploaders bring: store paths and attestations."""
