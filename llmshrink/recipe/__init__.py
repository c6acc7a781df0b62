"""What is to be done to a model: a recipe, read and validated, then given out to the model's sites."""
