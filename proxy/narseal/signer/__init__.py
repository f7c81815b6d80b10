"""The signer: a trust domain of its own, which believes nothing that the proxy says."""
