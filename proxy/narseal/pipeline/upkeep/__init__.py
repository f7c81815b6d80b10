"""What is done to what is there: rotation, revocation, repair, check, rebuild."""
