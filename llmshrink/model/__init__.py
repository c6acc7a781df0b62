"""Where the weights live: a skeleton of the model, its blocks made real one at a time, and the sites inside them."""
