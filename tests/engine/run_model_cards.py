"""Runs the program in the model card of each folder given, where fastdistill cannot be imported.

Beside FOLDER lies FOLDER.noise.safetensors with what the program is to draw: torch.randn gives it
in turn. The program runs twice: as it is, which leaves FOLDER.png, and for an image that is not
rounded to 8 bits, which goes to FOLDER.image.safetensors.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


class Blocked:
    """Finds fastdistill nowhere."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "fastdistill":
            raise ModuleNotFoundError(f"{name} is blocked here")


sys.meta_path.insert(0, Blocked)
try:
    import fastdistill  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    sys.exit("fastdistill was imported")

import safetensors.torch  # noqa: E402
import torch  # noqa: E402

randn = torch.randn


def drawing(noises):
    """torch.randn, giving these noises to those who ask for their shape, in turn."""
    left = list(noises)

    def draw(*size, **options):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        # Fresh models and a sampler's last step, which multiplies it by 0, draw noise too.
        if not left or tuple(left[0].shape) != shape:
            return randn(shape)
        return left.pop(0)

    return draw, left


def run(program: str, folder: Path) -> dict:
    noises = safetensors.torch.load_file(f"{folder}.noise.safetensors")
    torch.randn, left = drawing(noises[name] for name in sorted(noises))
    scope: dict = {}
    exec(compile(program, f"{folder.name}/README.md", "exec"), scope)
    torch.randn = randn
    assert not left, f"{len(left)} noises were not drawn"
    return scope


for folder in map(Path, sys.argv[1:]):
    os.chdir(folder.parent)
    card = (folder / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    run(program, folder)
    Path("sample.png").rename(f"{folder}.png")
    exact = program.replace(").images", '    output_type="pt",\n).images')
    image = run(exact.replace("image.save", "str"), folder)["image"]
    safetensors.torch.save_file({"image": image}, f"{folder}.image.safetensors")
assert not any(name.startswith("fastdistill") for name in sys.modules)
