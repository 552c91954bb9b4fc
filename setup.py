"""Packages are found on disk, so a new folder is packaged with nothing to edit.

The repository's folders are the import package's subpackages: top-level names such as `kernels` belong to others.
"""

from setuptools import find_packages, setup

LAYERS = ("compiler", "dsl", "kernels", "runtime")

setup(
    packages=[
        *find_packages(include=["trainc", "trainc.*"]),
        *(f"trainc.{name}" for name in find_packages(include=[f"{n}*" for n in LAYERS])),
    ],
    package_dir={"trainc": "trainc"} | {f"trainc.{layer}": layer for layer in LAYERS},
)
