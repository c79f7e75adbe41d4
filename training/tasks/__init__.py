"""What can be trained: a task for each kind of recipe."""
