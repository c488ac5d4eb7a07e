"""Packaging of megatron_hetermoe: heterogeneous mixture-of-experts training for Megatron-Core."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron-hetermoe",
    version="0.1.0",
    description="Trains Megatron mixture-of-experts models with attention and experts on different GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_hetermoe", "megatron_hetermoe.*"]),
    package_data={"megatron_hetermoe.cost": ["*.yaml"], "megatron_hetermoe.cli": ["page/*", "*.sh"]},
    python_requires=">=3.12",
    install_requires=[
        # Ranges are those the test suite has run with. torch stays wide at the top because V100 needs a
        # cu126 build, which exists for 2.11 to 2.14; pip never replaces one that is already there.
        "torch>=2.11,<2.15",
        "megatron-core>=0.19.2,<0.20",
        "einops>=0.8,<0.9",  # imported by megatron.training
        "psutil>=6,<8",  # imported by megatron's checkpoint writer, which does not require it
        "numpy>=2.0,<3",
        "scipy>=1.14,<2",
        "PyYAML>=6.0,<7",
        "rich>=13.9,<16",
    ],
    extras_require={
        "convert": ["safetensors>=0.8,<0.9"],
        "data": ["pyarrow>=22,<23", "transformers>=5.12,<5.13"],
        "plot": ["matplotlib>=3.9,<4"],
        "test": ["matplotlib>=3.9,<4", "pyarrow>=22,<23", "transformers>=5.12,<5.13", "safetensors>=0.8,<0.9",
                 "pytest>=8.3,<10", "hypothesis>=6.115,<7"],
    },
    entry_points={"console_scripts": ["hetermoe=megatron_hetermoe.cli.main:main"]},
)
