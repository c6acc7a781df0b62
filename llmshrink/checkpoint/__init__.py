"""Where a model's files come from, and what lies in them."""
