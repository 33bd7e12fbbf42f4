"""Lets `import torchvision` work where its compiled operators cannot load.

PyPI's torchvision is linked against CUDA. Beside a CPU-only torch its operators do not load, and the
import dies with "operator torchvision::nms does not exist". Declaring the schemas of the two operators
it registers unconditionally is enough; its transforms are plain torch.

scripts/install.sh copies this file into site-packages, with a .pth file that calls `install()` in every
process, and only where the import fails without it. Nothing heavy happens at interpreter start: the work
is done when torchvision is imported, and there is none if its operators do load.
"""

import glob
import os
import sys
from importlib.machinery import PathFinder

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept_alive = []  # a torch.library.Library takes its operators with it when it is collected


def declare(folder):
    """Declare the operators, unless the compiled library in torchvision's folder brings them."""
    import torch

    try:
        for library_path in glob.glob(os.path.join(folder, "_C*.so")):
            torch.ops.load_library(library_path)
    except OSError:
        pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept_alive.append(library)
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)


class _TorchvisionFinder:
    """Finds torchvision as usual, and has `declare` run just before its code does."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module):
            declare(spec.submodule_search_locations[0])
            run_module(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    if not any(type(finder).__name__ == "_TorchvisionFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
