"""`python -m bench distributed`: one sequence over ranks. run.py starts the ranks, worker.py is one, report.py has table and picture."""
