"""How compressed weights lie on disk, and which engine serves what."""
