"""The Sigstore room: keys, envelopes, statements, bundles; making and verifying signatures."""
