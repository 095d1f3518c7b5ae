"""Packages are named one by one: kernels/ has no __init__.py on purpose, and find_packages would drop it."""

from setuptools import setup

setup(
    packages=[
        "bco_fast",
        "bco_fast.accelerate_configs",
        "bco_fast.cli",
        "bco_fast.configs",
        "bco_fast.data",
        "bco_fast.evaluation",
        "bco_fast.head",
        "bco_fast.head.backends",
        "bco_fast.head.sparse",
        "bco_fast.integrations",
        "bco_fast.kernels",
        "bco_fast.losses",
        "bco_fast.models",
        "bco_fast.online",
        "bco_fast.reference",
        "bco_fast.training",
    ],
    # Tracked symlinks in bco_fast/ point to these folders too. A regular package called `kernels` at the root would shadow
    # Hugging Face's package of that name, which transformers imports.
    package_dir={
        "bco_fast": "bco_fast",
        "bco_fast.kernels": "kernels",
        "bco_fast.configs": "configs",
        "bco_fast.accelerate_configs": "accelerate_configs",
    },
    package_data={
        "bco_fast": ["py.typed", "__init__.pyi"],
        "bco_fast.cli": ["help/*.txt"],
        "bco_fast.configs": ["*.yaml", "experiments/*.yaml"],
        "bco_fast.accelerate_configs": ["*.yaml"],
    },
)
