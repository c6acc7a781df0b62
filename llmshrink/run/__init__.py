"""The loop over blocks: what is read, solved, written, and found again after a crash."""
