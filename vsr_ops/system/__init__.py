"""What the machine gives: memory, and files that no run may lose."""
