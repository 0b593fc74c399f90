"""Install the faults of FAULTS in every process that imports coconut_ds.training.trainer.

Python imports this module at its start when its folder is on PYTHONPATH.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys


class InstallAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Load coconut_ds.training.trainer as usual, then break what FAULTS says."""

    def find_spec(self, name, path, target=None):
        if name != "coconut_ds.training.trainer":
            return None
        self.spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.loader = self.spec.loader
        self.spec.loader = self
        return self.spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.loader.exec_module(module)
        from tests.faults.faulty import install

        install(json.loads(os.environ["FAULTS"]))


if os.environ.get("FAULTS", "[]") != "[]":
    sys.meta_path.insert(0, InstallAfterImport())
