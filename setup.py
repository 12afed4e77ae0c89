"""Entry point of the build; pyproject.toml holds everything that can be written down as data."""

from setuptools import setup

setup()
