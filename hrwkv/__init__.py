"""Convert Transformers to hybrids of RWKV-7 and attention layers, distil, evaluate and run them.

``import hrwkv`` makes Transformers' Auto classes know the hybrid. Importing torch and Transformers takes
seconds, so it is not done here for that purpose: the hybrid is registered at once where the Auto classes are
loaded already, and otherwise at the moment when they are. ``hrwkv --help`` therefore waits for neither.
"""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    """Let AutoConfig read our config.json."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from hrwkv.model.config import HybridConfig

    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)


def _register_model() -> None:
    """Let AutoModelForCausalLM open our directories."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from hrwkv.model.config import HybridConfig
    from hrwkv.model.hf import HybridForCausalLM

    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _ThenRegister(importlib.abc.Loader):
    """Runs a module by its own loader, then registers; afterwards the module shows its own loader only."""

    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._register()


class _AutoClassFinder(importlib.abc.MetaPathFinder):
    """Finds the Auto classes' modules as the other finders do, and has them run by ``_ThenRegister``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = _REGISTRATIONS.get(fullname)
        if register is None:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AutoClassFinder))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, register)
        return spec


def _register_now_or_on_import() -> None:
    sys.meta_path.insert(0, _AutoClassFinder())
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register()


_register_now_or_on_import()
