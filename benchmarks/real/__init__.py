"""A real language model that anybody can have from the package index: our rows, the peers' and downstream tasks."""
