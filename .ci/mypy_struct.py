"""mypy plugin for `flax.struct.dataclass`: `replace` exists, and a leaf may be anything.

flax declares its decorator as a dataclass transform, which cannot say that a method appears. And
one tree type holds arrays, their plans (ParamSpec), shardings, numpy: constructors take any value,
so names and number of fields are checked; what is read has the annotated type.
"""

from collections.abc import Callable

from mypy.nodes import ARG_STAR2, Argument, FuncDef, Var
from mypy.plugin import ClassDefContext, Plugin
from mypy.plugins.common import add_method_to_class
from mypy.plugins.dataclasses import dataclass_class_maker_callback
from mypy.types import AnyType, CallableType, TypeOfAny
from mypy.typevars import fill_typevars


def _as_struct(context: ClassDefContext) -> bool:
    ready = dataclass_class_maker_callback(context)  # this hook stands in for mypy's own
    info, anything = context.cls.info, AnyType(TypeOfAny.explicit)
    updates = Argument(Var("updates", anything), anything, None, ARG_STAR2)
    add_method_to_class(context.api, context.cls, "replace", [updates], fill_typevars(info))
    init = info.names["__init__"].node if "__init__" in info.names else None
    if isinstance(init, FuncDef) and isinstance(init.type, CallableType):
        own, *fields = init.type.arg_types
        init.type = init.type.copy_modified(arg_types=[own, *(anything for _ in fields)])
    return ready


class StructPlugin(Plugin):
    """Answers for one decorator."""

    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        """The hook for flax's structs, or None for every other decorator."""
        return _as_struct if fullname == "flax.struct.dataclass" else None


def plugin(version: str) -> type[Plugin]:
    """What mypy calls: the plugin for this version of mypy."""
    return StructPlugin
