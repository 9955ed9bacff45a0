"""Builds the native CPU core (plain C interface, loaded by `actors/native/library.py`).

It is optional: where no C++ compiler is found the package installs without it and runs on torch. Everything
else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("actors/native")

setup(
    ext_modules=[
        Extension(
            "actors.native._core",
            sources=sorted(str(p) for p in NATIVE.glob("*.cpp")),
            depends=sorted(str(p) for p in NATIVE.glob("*.h")),
            language="c++",
            # Sums keep their written order and fused operations are written out: the bits of a result must
            # not depend on what the compiler found worth fusing in one kernel and not in another.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-pthread",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
