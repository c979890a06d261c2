"""Learn, run and extend multimodal sequential recommendation.

Public names load on first use: `import mmseqrec` itself imports neither torch nor transformers, polars or matplotlib.
"""
__version__ = "0.1.0"


def _public_names():
    "Map every public name to the module that defines it, as nbdev's index records them."
    from mmseqrec._modidx import d

    names = (symbol.rpartition(".")[::2] for symbols in d["syms"].values() for symbol in symbols)
    return {name: module for module, name in names if module in d["syms"] and not name.startswith("_")}


def __getattr__(name):
    from importlib import import_module

    if name.startswith("__"): raise AttributeError(name)
    names = _public_names()
    if name in names: return getattr(import_module(names[name]), name)
    try: return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}": raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__():
    return sorted({*globals(), *_public_names()})
