"Reads version and requirements from settings.ini, their one home; everything else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
read = lambda key: settings["DEFAULT"][key].split()
setup(version=settings["DEFAULT"]["version"], install_requires=read("requirements"),
      extras_require={"dev": read("dev_requirements")})
