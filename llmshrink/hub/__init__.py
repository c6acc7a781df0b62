"""From a finished folder to the Hugging Face Hub: what would go, whether it may, and all of it in one commit."""
