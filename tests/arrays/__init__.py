"""Arrays of other libraries, device arrays and streams."""
