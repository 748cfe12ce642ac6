"""Triton's interpreter with less to do for the same results: it runs most of the tests.

What it did again and again took half of the time:
- Every sum of integers was computed once more in 64 bits, to see whether 32 would do. The sizes of
  tests cannot tell these apart; tests/test_gpu.py has one that can.
- At each call of a function of a kernel it looked through all of Triton's language for what to
  replace by its own, which the kernel had already done, and is always the same.
"""

import dataclasses
import functools
import inspect


def make_faster():
    """Do so in this process; nothing where Triton's insides are others than were known."""
    from triton.language import core
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if _takes(interpreter._patch_builtin, "pkg", "builder", "scope"):
        interpreter._patch_builtin = _patching_the_known(interpreter._patch_attr, core.is_builtin)
    if _takes(interpreter._patch_lang, "fn"):
        languages = [interpreter.tl, core]
        interpreter._patch_lang = _patching_once(interpreter._patch_lang, languages)


def _takes(function, *names):
    return tuple(inspect.signature(function).parameters) == names


def _patching_the_known(patch_attribute, is_builtin):
    @functools.cache
    def names(package):
        # First asked for when nothing is replaced yet.
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(pkg, builder, scope):
        for name in names(pkg):
            patch_attribute(pkg, name, getattr(pkg, name), builder, scope)

    return patch_builtin


def _patching_once(patch, languages):
    """A kernel patches and restores; the functions that it calls have little or nothing left to."""
    patched, scopes = set(), []

    @functools.cache
    def languages_of(fn):
        modules = filter(inspect.ismodule, fn.__globals__.values())
        return {id(module) for module in modules if module in languages}

    def patch_lang(fn):
        if languages_of(fn) <= patched:
            return None  # Of a kernel's function, which does not restore.
        scope = patch(fn)
        patched.update(languages_of(fn))
        scopes.append(scope.restore)
        if len(scopes) == 1:
            scope.restore = restore
        return scope

    def restore():
        patched.clear()
        while scopes:
            scopes.pop()()

    return patch_lang
