"""``specattn eval TASK``: a module for each task's command, and what they have in common.

A command has the task's own options and those of every run: it takes ``options: RunOptions``, and
:func:`~specattn.cli.tasks.options.with_run_options` puts their parameters in its place.
"""
