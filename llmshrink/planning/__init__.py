"""What a run needs and yields, said before it starts."""
