"""Programs of users, checked by mypy and pyright."""
