"""From a finished checkpoint to a running engine: the line that serves it, and the proof that it answers rightly."""
