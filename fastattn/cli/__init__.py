"""The command line, `python -m fastattn` or `fastattn`: main.py has the parser, each command a file of its own with
`add`, which adds its arguments, and `run`, which returns the exit status.
"""
