"""What a signature may rest on: evidence, policy, the operator's keys, Sigstore."""
