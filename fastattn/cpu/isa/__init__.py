"""The engine compiled once per instruction set; `fastattn.cpu` picks one at import."""
