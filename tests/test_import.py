"""What importing mim3d costs, and what it works without."""

import subprocess
import sys
import textwrap

#: Never needed: extras, packages that drag in a CUDA build, and experiment trackers.
OPTIONAL = (
    "torchvision timm einops blosc2 dask distributed highdicom tensorboard wandb mlflow onnx onnxscript onnxruntime "
    "huggingface_hub dynamic_network_architectures triton lightning pytorch_lightning sklearn skimage pandas tqdm itk "
    "psutil pytest"
).split()

#: What `import mim3d` and the parsing of a command line must not load.
HEAVY = set("torch matplotlib torchvision monai SimpleITK nibabel pyarrow zarr rich jinja2".split())

#: Makes the optional packages look absent, to `import` and to `importlib.util.find_spec` alike.
BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mim3d_is_quick_and_loads_nothing_heavy():
    code = """
    import sys, time
    start_s = time.process_time()
    import mim3d
    print(time.process_time() - start_s)
    print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    cpu_s, loaded = run(code).splitlines()
    assert float(cpu_s) < 0.5
    assert not HEAVY & set(loaded.split())


def test_the_overview_of_commands_loads_nothing_heavy():
    code = """
    import sys
    from mim3d.cli import main
    main(["--help"])
    print(*{name.split(".")[0] for name in sys.modules})
    """
    assert not HEAVY & set(run(code).splitlines()[-1].split())


def test_models_load_in_half_a_second_apart_from_torch_and_without_plotting():
    code = """
    import sys, time
    import torch, lightning_fabric, numpy
    start_s = time.process_time()
    import mim3d
    mim3d.create_model, mim3d.list_models, mim3d.load_encoder
    print(time.process_time() - start_s)
    print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    cpu_s, loaded = run(code).splitlines()
    assert float(cpu_s) < 0.5
    assert not {"matplotlib", "torchvision", "monai", "SimpleITK"} & set(loaded.split())


def test_every_module_imports_without_the_optional_packages():
    code = """
    import importlib, pkgutil
    import mim3d
    for module in pkgutil.walk_packages(mim3d.__path__, "mim3d."):
        if module.name != "mim3d.__main__":
            importlib.import_module(module.name)
    """
    run(BLOCKER + textwrap.dedent(code))


def test_the_optional_packages_are_really_kept_away():
    code = """
    import importlib.util
    print(importlib.util.find_spec("pytest"), importlib.util.find_spec("numpy") is not None)
    """
    assert run(BLOCKER + textwrap.dedent(code)) == "None True\n"


def test_data_and_model_work_without_the_optional_packages(tmp_path):
    code = """
    import sys
    import torch
    import mim3d
    from mim3d.cli import main

    assert main(["phantom", sys.argv[1] + "/data", "--num_cases", "2", "--size", "32", "32", "32"]) == 0
    assert main(["cache", sys.argv[1] + "/data", "--out", sys.argv[1] + "/cache"]) == 0
    encoder = mim3d.create_model("hybrid_nano")
    assert encoder.feature_maps(torch.zeros(1, 1, 32, 32, 32))
    """
    run(BLOCKER + textwrap.dedent(code), str(tmp_path))


def test_label_maps_and_classes_are_scored_without_torch():
    code = """
    import sys
    import mim3d.workflows.evaluate
    import mim3d.tasks.segmentation.evaluation
    import mim3d.tasks.classification.evaluation
    print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    assert not {"torch", "monai"} & set(run(code).split())


def test_scans_are_cached_without_torch():
    code = """
    import sys
    import mim3d.commands.cache
    import mim3d.caching.case
    print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    assert not {"torch", "monai"} & set(run(code).split())
