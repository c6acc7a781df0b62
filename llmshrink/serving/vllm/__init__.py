"""The real vLLM, always in a process of its own: its imports, its failures and its memory stay there."""
