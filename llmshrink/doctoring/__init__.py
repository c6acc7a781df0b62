"""What of this environment would make a run fail, found before one does: versions, device, vLLM, disk, the Hub."""
