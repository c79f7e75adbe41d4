"""Single pictures: sizes, and colours."""
