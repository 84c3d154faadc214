"""The tests, a tree like the package's: README.md says how to run them and which module each file tests."""
