"""What narseal's commands do on a client's side: verify, download, sign, ask a running narseal."""
