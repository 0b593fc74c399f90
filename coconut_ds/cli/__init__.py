"""The commands of `python -m coconut_ds`, one module each: `add_arguments(parser)`, `run(args) -> exit code`.

The folder is the registry; the first line of a module's docstring is its summary in `--help`.
"""
