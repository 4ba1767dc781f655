"""Is the answer right, and is the difference real: verifiers, sandbox, tasks, generation and paired statistics.

Read in this order: `problem` (what a problem and a verdict are), `verifiers`, `tasks`, `generate`, `run`, `statistics`.
"""
