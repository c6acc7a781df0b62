"""A student taught by the model it was made from: the loss, students, teachers, and the run around them."""
